package node

import (
	"strings"
	"testing"

	"github.com/entente-mesh/entente/ca/keystore"
)

// One way of keeping keys, and what belongs to it.
func TestKeysConfig(t *testing.T) {
	const rest = "trustDomain: banking.example\nname: ca-1\ndatacenter: dc1\ndataDir: /nonexistent\nlisten: {raft: \"127.0.0.1:1\", api: \"127.0.0.1:2\"}\n"
	for _, test := range []struct{ text, says string }{
		{"keys: {passphraseFile: p}", ""},
		{"keys: {systemdCredential: entente-ca}", ""},
		{"keys: {insecureDev: true}", ""},
		{"", "exactly one of"},
		{"keys: {insecureDev: true, passphraseFile: p}", "exactly one of"},
		{"keys: {systemdCredential: c, passphraseFile: p}", "exactly one of"},
		{"keys: {pkcs11: {module: /m, token: t, pinFile: p}, insecureDev: true}", "exactly one of"},
		{"keys: {passphraseFile: p}\nupstream: {certificate: c, key: k}", ""},
		{"keys: {passphraseFile: p}\nupstream: {certificate: c}", "needs key or keyCredential"},
		{"keys: {passphraseFile: p}\nupstream: {certificate: c, key: k, keyCredential: k}", "needs key or keyCredential"},
		{"keys: {passphraseFile: p}\nupstream: {key: k}", "needs certificate"},
	} {
		_, err := ReadConfig("ca.yaml", strings.NewReader(rest+test.text+"\n"))
		if test.says == "" && err != nil || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
			t.Errorf("%s: %v", test.text, err)
		}
	}
	token := "keys: {pkcs11: {module: /m, token: t, pinFile: p}}\n"
	cfg, err := ReadConfig("ca.yaml", strings.NewReader(rest+token))
	switch {
	case keystore.PKCS11 && (err != nil || cfg.Keys.PKCS11.Label != "entente/banking.example/ca-1"):
		t.Errorf("pkcs11: %v", err)
	case !keystore.PKCS11 && (err == nil || !strings.Contains(err.Error(), "-tags pkcs11")):
		t.Errorf("pkcs11 in a binary without it: %v", err)
	}
}
