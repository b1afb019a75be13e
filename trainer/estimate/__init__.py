"""Memory, time and cost before anything is started."""
