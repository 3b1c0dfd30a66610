"""What can be measured of pictures, a file each: its checks, its expensive part, its numbers."""
