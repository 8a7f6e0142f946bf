"""Row-wise chains: operations that act row by row share one draw of cotangent rows and one set of stored tensors."""
