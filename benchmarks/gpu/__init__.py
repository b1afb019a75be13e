"""All measurements that need a GPU, in one run of minutes; see README.md."""
