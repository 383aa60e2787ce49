"""One small table."""

from django.db import models


class Token(models.Model):
    """Something written once: a value that is there twice, or is missing, shows."""

    id = models.AutoField(primary_key=True)
    value = models.CharField(max_length=100, unique=True)

    def __str__(self) -> str:
        return self.value
