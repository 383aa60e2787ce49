"""A DATABASES entry, read into what the core needs, with errors that name the setting.

:func:`.reading.problems` collects every problem of an entry at once: the system checks show
them all, and making a connection raises the first that is an error. Nothing
here connects to anything.
"""
