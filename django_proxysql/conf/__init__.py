"""A DATABASES entry, read into what the core needs, with errors that name the setting.

:func:`problems` collects every problem of an entry at once: the system checks show
them all, and making a connection raises the first that is an error. Nothing
here connects to anything.
"""

from .aliases import introduce_peers, is_testing, mirrored, mirrors, name_of_a_peer
from .engines import PeerEngine, engine_path, load_wrapper, peer_engine
from .keys import ALIAS_KEY, CONNECTION_KEYS, ENGINE, NAME_KEY, PEER_ALIAS_ENGINE, is_balancer
from .merging import changed_keys, first_reading, merged_settings, same
from .reading import balancer_config, in_words, messages, problems, stops_connections

__all__ = [
    "ALIAS_KEY",
    "CONNECTION_KEYS",
    "ENGINE",
    "NAME_KEY",
    "PEER_ALIAS_ENGINE",
    "PeerEngine",
    "balancer_config",
    "changed_keys",
    "engine_path",
    "first_reading",
    "in_words",
    "introduce_peers",
    "is_balancer",
    "is_testing",
    "load_wrapper",
    "merged_settings",
    "messages",
    "mirrored",
    "mirrors",
    "name_of_a_peer",
    "peer_engine",
    "problems",
    "same",
    "stops_connections",
]
