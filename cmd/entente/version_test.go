package main

import (
	"strings"
	"testing"

	"github.com/entente-mesh/entente/ca/keystore"
)

// The version tells a binary with PKCS#11 from one without; one without says what to do
// when it is configured.
func TestVersionTellsPKCS11(t *testing.T) {
	out, code := entente(t, "version")
	want := map[bool]string{true: ", with PKCS#11", false: ", without PKCS#11"}[keystore.PKCS11]
	if code != exitOK || !strings.Contains(out, want) {
		t.Errorf("%q, %d", out, code)
	}
}
