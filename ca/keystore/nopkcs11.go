//go:build !pkcs11

package keystore

// PKCS11 tells whether this binary was built with PKCS#11.
const PKCS11 = false

// Token is a PKCS#11 token; this binary has none.
type Token struct{ *Store }

// OpenToken refuses: this binary was built without PKCS#11.
func OpenToken(TokenConfig) (*Token, error) { return nil, ErrNoPKCS11 }
