"""Operations whose vector-Jacobian product may be sketched."""
