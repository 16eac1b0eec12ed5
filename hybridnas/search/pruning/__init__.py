"""When a trial is paused and taken up again: asynchronous successive halving."""
