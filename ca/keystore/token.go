package keystore

import "errors"

// TokenConfig says where a node's keys are in a PKCS#11 token.
type TokenConfig struct {
	Module        string // the vendor's library
	Token         string // label of the token
	Label         string // what the labels of this node's keys begin with
	PINFile       string // one of the two
	PINCredential string
}

// ErrNoPKCS11: the binary was built without PKCS#11.
var ErrNoPKCS11 = errors.New("this binary was built without PKCS#11: build one with cgo and -tags pkcs11 (`entente version` tells)")
