"""Memory, time and cost of a run before it is started; every assumption is printed and can be overridden."""
