"""`python -m tests.chaos.run`: run schedules of faults, replay one, resume a long soak, write the report.

python -m tests.chaos.run --seed 17               replay one; after a failure its logs are in .cache/chaos/kept
python -m tests.chaos.run --schedules 100         the next ones of a soak of 100; started again it resumes
python -m tests.chaos.run --report                write the soak's result into docs/reliability.md
"""

# Nothing else at the top: every process that a rank spawns imports this module again.
if __name__ == "__main__":
    import sys

    from tests.chaos.campaign import main

    sys.exit(main())
