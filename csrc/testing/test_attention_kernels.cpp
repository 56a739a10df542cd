// Tests of the kernels of class_attention, received_attention, masked_attention and masked_attention_backward.
#include "testing/kernel_cases.h"

namespace diffrate::testing {
namespace {

Heads heads_of(const float* data, int64_t heads, const Case& c) {
  return {.data = data,
          .stride_image = heads * c.tokens * c.channels,
          .stride_head = c.tokens * c.channels,
          .stride_token = c.channels};
}

void test_attention(const Case& c, const cpu::Threads& threads) {
  const int64_t heads = 3;
  int64_t patches = c.tokens - c.prefix;
  auto q = random_floats(c.images * heads * c.tokens * c.channels, 8);
  auto k = random_floats(c.images * heads * c.tokens * c.channels, 9);
  auto size = random_floats(c.images * c.tokens, 10, 0.5f, 3);
  auto first = exact<float>(c.images * patches), received = exact<float>(c.images * patches);
  AttentionArgs args{.type = Type::f32,
                     .images = c.images,
                     .heads = heads,
                     .tokens = c.tokens,
                     .head_dim = c.channels,
                     .prefix = c.prefix,
                     .q = heads_of(q.get(), heads, c),
                     .k = heads_of(k.get(), heads, c),
                     .v = {},
                     .mask = {},
                     .size = vector_of(size.get(), c),
                     .scale = 0.5,
                     .received = false,
                     .out = nullptr,
                     .importance = first.get(),
                     .grad = {},
                     .grad_q = nullptr,
                     .grad_k = nullptr,
                     .grad_v = nullptr,
                     .grad_mask = nullptr};
  cpu::kernels().class_attention(args, threads);
  args.importance = received.get();
  cpu::kernels().received_attention(args, threads);
  bool class_right = true, received_right = true;
  for (int64_t b = 0; b < c.images; ++b) {
    std::vector<double> row(c.tokens), class_mean(c.tokens), received_mean(c.tokens);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < c.tokens; ++i) {
        double total = 0;
        for (int64_t j = 0; j < c.tokens; ++j) {
          double dot = 0;
          for (int64_t d = 0; d < c.channels; ++d)
            dot += double(q[((b * heads + h) * c.tokens + i) * c.channels + d]) *
                   k[((b * heads + h) * c.tokens + j) * c.channels + d];
          total += row[j] = std::exp(0.5 * dot) * size[b * c.tokens + j];
        }
        for (int64_t j = 0; j < c.tokens; ++j) {
          if (i == 0) class_mean[j] += row[j] / total / heads;
          received_mean[j] += row[j] / total / heads / c.tokens;
        }
      }
    }
    for (int64_t j = 0; j < patches; ++j) {
      class_right = class_right && near(first[b * patches + j], class_mean[j + c.prefix]);
      received_right = received_right && near(received[b * patches + j], received_mean[j + c.prefix]);
    }
  }
  check(class_right, "class_attention", c.tokens, c.channels);
  check(received_right, "received_attention", c.tokens, c.channels);
}

// sum_i out_i . grad_i of masked attention, by its formula in double.
double masked_attention_loss(const Case& c, int64_t heads, const std::vector<double>& q, const std::vector<double>& k,
                             const std::vector<double>& v, const std::vector<double>& mask, const float* size,
                             const float* grad, std::vector<double>* out, std::vector<double>* importance) {
  double loss = 0;
  std::vector<double> e(c.tokens);
  for (int64_t b = 0; b < c.images; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < c.tokens; ++i) {
        auto row = [&](int64_t token) { return ((b * heads + h) * c.tokens + token) * c.channels; };
        double top = -INFINITY, total = 1e-6;
        for (int64_t j = 0; j < c.tokens; ++j) {
          e[j] = std::log(double(size[b * c.tokens + j]));
          for (int64_t d = 0; d < c.channels; ++d) e[j] += 0.5 * q[row(i) + d] * k[row(j) + d];
          top = std::fmax(top, e[j]);
        }
        for (int64_t j = 0; j < c.tokens; ++j) {
          e[j] = std::exp(e[j] - top) * (i == j ? 1 : mask[b * c.tokens + j]);
          total += e[j];
        }
        for (int64_t j = 0; j < c.tokens; ++j) {
          double a = (e[j] + 1e-6 / double(c.tokens)) / total;
          if (importance && i == 0 && j >= c.prefix)
            (*importance)[b * (c.tokens - c.prefix) + j - c.prefix] += a / double(heads);
          for (int64_t d = 0; d < c.channels; ++d) {
            loss += a * v[row(j) + d] * double(grad[row(i) + d]);
            if (out) (*out)[((b * c.tokens + i) * heads + h) * c.channels + d] += a * v[row(j) + d];
          }
        }
      }
    }
  }
  return loss;
}

// The forward pass against the formula, the gradients against its difference quotient in a random direction.
void test_masked_attention(const Case& c, const cpu::Threads& threads) {
  const int64_t heads = 2;
  int64_t rows = c.images * c.tokens, count = rows * heads * c.channels, patches = c.tokens - c.prefix;
  auto q = random_floats(count, 11), k = random_floats(count, 12), v = random_floats(count, 13);
  auto size = random_floats(rows, 14, 0.5f, 3), grad = random_floats(count, 15), mask = exact<float>(rows);
  for (int64_t i = 0; i < rows; ++i) mask[i] = i % c.tokens < c.k_p;
  auto out = exact<float>(count), importance = exact<float>(c.images * patches);
  auto grad_q = exact<float>(count), grad_k = exact<float>(count), grad_v = exact<float>(count);
  auto grad_mask = exact<float>(rows);
  AttentionArgs args{.type = Type::f32,
                     .images = c.images,
                     .heads = heads,
                     .tokens = c.tokens,
                     .head_dim = c.channels,
                     .prefix = c.prefix,
                     .q = heads_of(q.get(), heads, c),
                     .k = heads_of(k.get(), heads, c),
                     .v = heads_of(v.get(), heads, c),
                     .mask = vector_of(mask.get(), c),
                     .size = vector_of(size.get(), c),
                     .scale = 0.5,
                     .received = false,
                     .out = out.get(),
                     .importance = importance.get(),
                     .grad = heads_of(grad.get(), heads, c),
                     .grad_q = grad_q.get(),
                     .grad_k = grad_k.get(),
                     .grad_v = grad_v.get(),
                     .grad_mask = grad_mask.get()};
  cpu::kernels().masked_attention(args, threads);
  cpu::kernels().masked_attention_backward(args, threads);

  auto widened = [](const float* values, int64_t n) { return std::vector<double>(values, values + n); };
  std::vector<double> expected(count), expected_importance(c.images * patches);
  masked_attention_loss(c, heads, widened(q.get(), count), widened(k.get(), count), widened(v.get(), count),
                        widened(mask.get(), rows), size.get(), grad.get(), &expected, &expected_importance);
  bool forward_right = true, importance_right = true;
  for (int64_t i = 0; i < count; ++i) forward_right = forward_right && near(out[i], expected[i]);
  for (int64_t i = 0; i < c.images * patches; ++i)
    importance_right = importance_right && near(importance[i], expected_importance[i]);
  check(forward_right, "masked_attention", c.tokens, c.channels);
  check(importance_right, "masked_attention: importance", c.tokens, c.channels);

  auto step = random_floats(count, 16), mask_step = random_floats(rows, 17);
  const double h = 1e-4;
  auto moved = [&](const float* values, const float* direction, int64_t n, double by) {
    std::vector<double> result(n);
    for (int64_t i = 0; i < n; ++i) result[i] = values[i] + by * direction[i];
    return result;
  };
  auto along = [&](const float* gradient, const float* direction, int64_t layout) {
    double total = 0;
    for (int64_t i = 0; i < layout; ++i) {
      int64_t at = i;
      if (layout == count) {  // gradients are (B, N, H, D), directions (B, H, N, D)
        int64_t d = i % c.channels, head = i / c.channels % heads, token = i / c.channels / heads % c.tokens;
        int64_t image = i / c.channels / heads / c.tokens;
        at = ((image * heads + head) * c.tokens + token) * c.channels + d;
      }
      total += double(gradient[i]) * direction[at];
    }
    return total;
  };
  auto loss_at = [&](int which, double by) {
    auto maybe = [&](int index, const float* values) {
      return moved(values, step.get(), count, index == which ? by : 0);
    };
    return masked_attention_loss(c, heads, maybe(0, q.get()), maybe(1, k.get()), maybe(2, v.get()),
                                 moved(mask.get(), mask_step.get(), rows, which == 3 ? by : 0), size.get(), grad.get(),
                                 nullptr, nullptr);
  };
  const float* gradients[] = {grad_q.get(), grad_k.get(), grad_v.get(), grad_mask.get()};
  const char* names[] = {"masked_attention: gradient of q", "masked_attention: gradient of k",
                         "masked_attention: gradient of v", "masked_attention: gradient of the mask"};
  for (int which = 0; which < 4; ++which) {
    double quotient = (loss_at(which, h) - loss_at(which, -h)) / (2 * h);
    double found = which < 3 ? along(gradients[which], step.get(), count) : along(gradients[3], mask_step.get(), rows);
    check(near(found, quotient, 1e-3), names[which], c.tokens, c.channels);
  }
}

}  // namespace
}  // namespace diffrate::testing

int main() {
  using namespace diffrate::testing;
  say_what_runs();
  for (const auto& threads : pools())
    for (const Case& c : kCases) {
      test_attention(c, threads);
      test_masked_attention(c, threads);
    }
  return report(diffrate::cpu::kernels().name);
}
