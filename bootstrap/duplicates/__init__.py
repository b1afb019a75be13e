"""Images that occur again, also in another data set or an evaluation set: found by hashes, marked in a layer."""
