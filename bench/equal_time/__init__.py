"""The deep autoencoder after equal time, where no machine stands still for it: time is turned into numbers of steps."""
