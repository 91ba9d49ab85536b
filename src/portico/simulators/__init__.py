"""What only the internet provides, on this machine: real protocols on real sockets, and misbehaviour on request.

For tests, drills and demonstrations; no production process starts any of them.
"""
