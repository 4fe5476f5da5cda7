"""What overlap is worth: every mode and measure in one run, over a real slow link, a paced one, or none."""
