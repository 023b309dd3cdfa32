package meshagent

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

// What is kept as bytes is what was signed, in every form in which it is given out.
func TestKeptSVIDIsTheSame(t *testing.T) {
	ca := newFakeCA(time.Hour)
	key := ca.authority.Issue("/accounts").PrivateKey
	certificates := issue(ca.authority, key.Public(), bank, "/accounts", time.Hour)
	verified, err := verifySVID(spiffeid.RequireFromPath(bank, "/accounts"), certificates, key, ca.authority.Bundle(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	kept, err := keptSVID(spiffeid.RequireFromPath(bank, "/accounts"), recordOf(entry("accounts", "/accounts", 1)), certificates, key, &State{Bundle: ca.authority.Bundle(), View: &client.View{}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := kept.Parsed()
	if err != nil {
		t.Fatal(err)
	}
	if parsed.ID != verified.ID || !parsed.Certificates[0].Equal(verified.Certificates[0]) || !kept.NotAfter.Equal(verified.Certificates[0].NotAfter) {
		t.Errorf("%+v, before %+v", parsed, verified)
	}
	if again, _ := kept.Parsed(); again != parsed {
		t.Error("it is parsed anew each time")
	}
	chain, pkcs8 := kept.PEM()
	wantChain, wantKey, err := verified.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(chain, wantChain) || !bytes.Equal(pkcs8, wantKey) {
		t.Errorf("PEM %s %d bytes, not %s", chain, len(pkcs8), wantChain)
	}
	if _, err := tls.X509KeyPair(chain, pkcs8); err != nil {
		t.Error(err)
	}
	if err := kept.verify(ca.authority.Bundle(), time.Now().Add(2*time.Hour)); err == nil {
		t.Error("it verifies after its end")
	}
	if err := kept.verify(ca.authority.Bundle(), time.Now()); err != nil {
		t.Errorf("control: %v", err)
	}
}

// A call of a workload on a host with thousands of entries for its user.
func BenchmarkIdentitiesOf(b *testing.B) {
	s := &State{}
	for i := range 6000 {
		e := entry(fmt.Sprintf("service/s%04d", i), fmt.Sprintf("/s%d", i), 1)
		e.Selectors = []string{fmt.Sprintf("unix:uid:%d", os.Getuid()), fmt.Sprintf("unix:path:/opt/s%d/server", i)}
		identity, err := s.identify(e, nil, bank, "h1")
		if err != nil {
			b.Fatal(err)
		}
		s.Identities = append(s.Identities, identity)
	}
	process, err := workloadattest.New().PID(os.Getpid())
	if err != nil {
		b.Skip(err)
	}
	defer process.Close()
	for b.Loop() {
		if got := s.IdentitiesOf(process); len(got) != 0 {
			b.Fatal(got)
		}
	}
}
