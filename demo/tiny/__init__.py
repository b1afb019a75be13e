"""A complete input without any download: generated scenes, tiny frozen parts, and the recipe that trains on them."""
