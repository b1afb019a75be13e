"""Everything that only a GPU can show, in one prepared run of minutes: see README.md."""
