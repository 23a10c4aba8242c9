"""What each format is: how to recognise, read and write it."""
