"""The wire: channels, conversions between messages and types, many calls at once."""
