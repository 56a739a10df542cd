"""The rate search: compression rates learned by gradient descent (DiffRate, section 3).

``rates.py`` holds the rates and makes a model search, ``masking.py`` is what a block then does with its tokens,
``loop.py`` the training loop around it, ``data.py`` its images. (The package is not called ``search``: that is the
function ``diffrate_ext.search``, which a package of that name would hide.)
"""
