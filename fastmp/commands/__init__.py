"""The commands of ``fastmp``, one file each."""
