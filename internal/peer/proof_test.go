package peer_test

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// What was proved of one SVID says nothing of another. How a proof ends with the bundle,
// the clock and distrust is TestRegistryRecheck's and TestDistrust's.
func TestProofIsOfOneChain(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	authority, impostor := peertest.NewAuthority(td), peertest.NewAuthority(td)
	accounts, ledger, forged := authority.Issue("/accounts"), authority.Issue("/ledger"), impostor.Issue("/accounts")
	var proof peer.Proof
	for range 2 {
		if id, err := proof.Verify(accounts.Certificates, authority.Bundle(), time.Now()); err != nil || id != accounts.ID {
			t.Fatalf("control: %s %v", id, err)
		}
		if id, err := proof.Verify(ledger.Certificates, authority.Bundle(), time.Now()); err != nil || id != ledger.ID {
			t.Errorf("the other SVID: %s %v", id, err)
		}
		if _, err := proof.Verify(forged.Certificates, authority.Bundle(), time.Now()); err == nil {
			t.Error("an SVID of nobody's authority passes for the one that was proved")
		}
		if _, err := proof.Verify(nil, authority.Bundle(), time.Now()); err == nil {
			t.Error("no SVID passes for the one that was proved")
		}
	}
}
