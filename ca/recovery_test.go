package ca

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

func recoveryKey(fill byte) *RecoveryKey {
	return &RecoveryKey{
		TrustDomain: spiffeid.RequireTrustDomainFromString("banking.example"),
		ClusterID:   bytes.Repeat([]byte{1}, ClusterIDSize),
		Seed:        bytes.Repeat([]byte{fill}, 32),
	}
}

func TestRecoveryKeyText(t *testing.T) {
	key := recoveryKey(7)
	text, err := key.Text()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseRecoveryKey(" " + text[:30] + "\n" + text[30:] + "\n")
	if err != nil || !bytes.Equal(got.Seed, key.Seed) || !bytes.Equal(got.ClusterID, key.ClusterID) || got.TrustDomain != key.TrustDomain {
		t.Fatalf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "entente-join-" + text, text[:len(text)-3], text + "A", strings.Replace(text, "B", "C", 1), strings.Repeat("a", 4<<10)} {
		if _, err := ParseRecoveryKey(bad); err == nil {
			t.Errorf("%.60q was read", bad)
		} else if strings.Contains(err.Error(), text[20:40]) {
			t.Errorf("the error shows the key: %v", err)
		}
	}
}

// I1: no way of printing shows the seed.
func TestRecoveryKeyStaysSecret(t *testing.T) {
	key := recoveryKey('s')
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("key", "key", key)
	encoded, _ := json.Marshal(key)
	for _, shown := range []string{fmt.Sprint(key), fmt.Sprintf("%v %+v %#v %s %x", *key, key, *key, key, *key), log.String(), string(encoded)} {
		if strings.Contains(shown, "ssss") || strings.Contains(shown, "7373") || strings.Contains(shown, "115, 115") || strings.Contains(shown, "115 115") {
			t.Errorf("the seed is shown: %s", shown)
		}
	}
}

func TestVerifyRecovery(t *testing.T) {
	key := recoveryKey(7)
	cluster := &statev1.Cluster{TrustDomain: "banking.example", Id: key.ClusterID, RecoveryKey: key.PublicKey()}
	good := func() *statev1.RecoveryStatement {
		return &statev1.RecoveryStatement{ClusterId: key.ClusterID, Epoch: 1, RecoveryId: make([]byte, RecoveryIDSize), MemberId: strings.Repeat("ab", 32)}
	}
	verify := func(by *RecoveryKey, st *statev1.RecoveryStatement) error {
		r, err := by.Sign(st)
		if err != nil {
			t.Fatal(err)
		}
		_, err = VerifyRecovery(cluster, r.GetStatement(), r.GetSignature())
		return err
	}
	if err := verify(key, good()); err != nil {
		t.Fatalf("the good statement: %v", err)
	}
	if err := verify(recoveryKey(8), good()); err == nil {
		t.Error("another key's signature was accepted")
	}
	for name, spoil := range map[string]func(*statev1.RecoveryStatement){
		"another cluster": func(s *statev1.RecoveryStatement) { s.ClusterId = make([]byte, ClusterIDSize) },
		"epoch 0":         func(s *statev1.RecoveryStatement) { s.Epoch = 0 },
		"epoch too large": func(s *statev1.RecoveryStatement) { s.Epoch = MaxEpoch + 1 },
		"short id":        func(s *statev1.RecoveryStatement) { s.RecoveryId = nil },
		"no member":       func(s *statev1.RecoveryStatement) { s.MemberId = "" },
	} {
		st := good()
		spoil(st)
		if err := verify(key, st); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	cluster.RecoveryKey = nil
	if err := verify(key, good()); err == nil {
		t.Error("a cluster without a recovery key was recovered")
	}
}

func FuzzParseRecoveryKey(f *testing.F) {
	text, _ := recoveryKey(7).Text()
	f.Add(text)
	f.Fuzz(func(t *testing.T, s string) {
		k, err := ParseRecoveryKey(s)
		if err != nil {
			return
		}
		again, err := k.Text()
		if err != nil || again != strings.Join(strings.Fields(s), "") {
			t.Fatalf("read %q as %q, %v", s, again, err)
		}
	})
}
