"""No models. Django sends its signals around ``migrate`` to apps that have this file.

The table of tokens (``COMMIT_OUTCOME``) is made by one of them (:mod:`.backends.tokens`). It is no
model's: a model would be on every alias to ``dumpdata``, content types and the like, and the table
is only where the setting is.
"""
