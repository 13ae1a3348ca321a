"""Results to tables, figures, claims and a report; reads rows only, never trains, needs no account or network."""
