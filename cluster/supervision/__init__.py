"""On the head: which size fits where, attempt after attempt, what a failure means, what follows."""
