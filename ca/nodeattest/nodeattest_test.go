package nodeattest

import (
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/internal/daemon"
)

// Each attestor has everything that it needs on this side: a section of the file, a field
// of the API that nothing else reads, and node selectors of its name.
func TestEveryAttestorHasARow(t *testing.T) {
	var rows, sections, kinds []string
	for _, a := range attestors {
		rows = append(rows, a.name)
	}
	for field := range reflect.TypeFor[Sections]().Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("yaml"), ",")
		sections = append(sections, name)
	}
	for _, kind := range selector.NodeKinds() {
		if kind.Attested {
			kinds = append(kinds, kind.Name)
		}
	}
	slices.Sort(rows)
	slices.Sort(sections)
	slices.Sort(kinds)
	if !slices.Equal(rows, sections) {
		t.Errorf("rows of attestors %v, fields of Sections %v", rows, sections)
	}
	if !slices.Equal(rows, kinds) {
		t.Errorf("rows of attestors %v, attested kinds of ca/selector %v", rows, kinds)
	}

	common := []protoreflect.Name{"token_id", "statement", "signature", "csr"}
	fields := (&ententev1.AttestRequest{}).ProtoReflect().Descriptor().Fields()
	readers := map[string]int{}
	for i := range fields.Len() {
		field := fields.Get(i)
		req := &ententev1.AttestRequest{}
		fill(req.ProtoReflect(), field)
		var by []string
		for _, a := range attestors {
			if a.evidence(req) != "" {
				by = append(by, a.name)
				readers[a.name]++
			}
		}
		switch shared := slices.Contains(common, field.Name()); {
		case shared && len(by) > 0:
			t.Errorf("%s is what every host sends, and %v take it for evidence", field.Name(), by)
		case !shared && len(by) != 1:
			t.Errorf("%s is evidence for %v; one attestor must read it", field.Name(), by)
		}
	}
	for _, name := range rows {
		if readers[name] == 0 {
			t.Errorf("%s has no field in AttestRequest", name)
		}
	}
}

// fill gives a field a value.
func fill(m protoreflect.Message, field protoreflect.FieldDescriptor) {
	value := protoreflect.ValueOfBytes([]byte("x"))
	switch {
	case field.IsList():
		m.Mutable(field).List().Append(value)
	case field.Kind() == protoreflect.StringKind:
		m.Set(field, protoreflect.ValueOfString("x"))
	case field.Kind() == protoreflect.MessageKind:
		m.Mutable(field)
	default:
		m.Set(field, value)
	}
}

// What a host shows counts only where the CA node's file names the attestor, for the key
// and the connection that the host named, and gives no other attestor's selectors.
func TestAdmit(t *testing.T) {
	p := newPKI(t, "hosts")
	key := newKey(t)
	leaf := p.host(func(c *x509.Certificate) { c.PublicKey = &key.PublicKey })
	bound := Bound{TrustDomain: "banking.example", KeyID: strings.Repeat("a", 64), Exporter: make([]byte, ca.ExporterSize)}
	statement, signature, err := ca.SignPossession(rand.Reader, key, &statev1.PossessionStatement{
		TrustDomain: bound.TrustDomain, KeyId: bound.KeyID, Certificate: Fingerprint(leaf.Raw), Exporter: bound.Exporter,
	})
	if err != nil {
		t.Fatal(err)
	}
	files := daemon.NewFiles(daemon.NewMetrics("ca"), slog.New(slog.DiscardHandler))
	good := &ententev1.AttestRequest{Certificates: [][]byte{leaf.Raw}, Statement: statement, Signature: signature}
	open, err := (&Sections{X509PoP: X509PoPSection{CABundle: p.file(), Zone: "dc1.example", Datacenter: "dc1"}}).Open(files)
	if err != nil {
		t.Fatal(err)
	}
	if host, err := open.Admit(good, bound, now); err != nil || host.GetName() != "h1" || host.GetKeyId() != "" {
		t.Fatalf("control: %v, %v", host, err)
	}
	none, err := (&Sections{}).Open(files)
	if err != nil {
		t.Fatal(err)
	}
	otherKey, otherConnection := bound, bound
	otherKey.KeyID = strings.Repeat("b", 64)
	otherConnection.Exporter = slices.Repeat([]byte{1}, ca.ExporterSize)
	foreign := Attestors{selector.X509PoP: func(*ententev1.AttestRequest, Bound, time.Time) (*statev1.Agent, error) {
		return &statev1.Agent{Name: "h1", Selectors: []string{"token:pci"}}, nil
	}}
	for what, test := range map[string]struct {
		open  Attestors
		req   *ententev1.AttestRequest
		bound Bound
		want  string
	}{
		"no section":             {none, good, bound, "set x509pop at every CA node"},
		"no attestors":           {nil, good, bound, "set x509pop at every CA node"},
		"nothing is shown":       {open, &ententev1.AttestRequest{Statement: statement, Signature: signature}, bound, "use a join token"},
		"another agent's key":    {open, good, otherKey, "another key"},
		"another connection":     {open, good, otherConnection, "another connection"},
		"no statement":           {open, &ententev1.AttestRequest{Certificates: good.Certificates}, bound, ""},
		"an operator's selector": {foreign, good, bound, "token:pci"},
	} {
		if host, err := test.open.Admit(test.req, test.bound, now); err == nil || host != nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, %v", what, host, err)
		}
	}
}
