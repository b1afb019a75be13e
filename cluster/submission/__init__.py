"""Submission from the operator's machine: the Jobs API, the code package, the state of a run."""
