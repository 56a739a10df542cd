"""Fine-tuning a model's weights at a fixed schedule.

``loop.py`` is the training loop, ``drop_path.py`` gives the blocks their drop path, ``quality.py`` says whether it
paid. (The package is not called ``finetune``: that is the function ``diffrate_ext.finetune``.)
"""
