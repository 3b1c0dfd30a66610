"""What several folders read, write or show: HTML pages, charts, bars, safetensors headers, settings in pictures."""
