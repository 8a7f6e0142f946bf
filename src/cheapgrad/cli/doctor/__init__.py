"""Does this environment do what cheapgrad builds on? Nothing here needs a torch that works."""

from cheapgrad.cli.doctor.examination import examine

__all__ = ["examine"]
