"""Lost COMMITs, and what the engine finds out about them: ``python -m tests.outcomes``."""
