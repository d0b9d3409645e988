"""HTTP only: parse a request, call the studio, render an answer."""
