"""On the head: attempt after attempt, what a failure means, what follows."""
