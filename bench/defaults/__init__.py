"""The study of defaults that need no tuning: many small settings, Adam's defaults as the baseline."""
