"""What joins a run to other people's code. Each module imports what it joins only when it is asked for."""
