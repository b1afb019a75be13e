"""From the operator's machine: Jobs API, code package, what is known of a run."""
