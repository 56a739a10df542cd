"""The rate search: compression rates learned by gradient descent (DiffRate, section 3).

``rates.py`` holds the rates and makes a model search, ``loop.py`` is the training loop around it, ``data.py`` its
images. What a block does with its tokens is up to the method (``methods/masking.py`` for DiffRate). (The package is not
called ``search``: that is the function ``diffrate_ext.search``, which a package of that name would hide.)
"""
