"""Suites: small trainings of many architectures on the same tasks, beside what papers published.

One suite is one file here and one registration: its tasks, how each is trained, the grid of rates, the default
architectures and the published rows. Importing this package loads no torch.
"""
