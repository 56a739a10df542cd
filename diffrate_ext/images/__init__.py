"""The user's pictures: where they are, and how batches are made of them."""
