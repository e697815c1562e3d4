"""Experiments that need minutes to hours: accuracy, convergence, transfer, overhead."""
