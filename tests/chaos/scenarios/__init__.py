"""What goes wrong, one file each: `run(run)` sets up an installation, lets it go wrong, and counts into `run.tally`."""
