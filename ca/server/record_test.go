package server_test

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/domain"
)

// A node signs for an entry only under its own record of it. Whoever was told of other
// selectors, at whatever revision, gets no SVID of any kind.
func TestSignsForItsOwnRecordOnly(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: accounts}\nspec: {run: {uid: 1000, hosts: [h1]}}\n")
	shown := attest(t, c, "h1")
	conn := dial(t, c, &shown)
	door := ententev1.NewSignClient(conn)
	var own *statev1.Entry
	c.Node().Read(func(st *domain.State) { own, _ = st.Entry("service/accounts") })
	csr := csrOf(t, newKey(t))

	sign := func(record []byte, revision uint64) map[string]*ententev1.TokenResult {
		t.Helper()
		x509, err := door.SignX509(t.Context(), &ententev1.SignX509Request{Requests: []*ententev1.X509Request{
			{EntryId: "service/accounts", Csr: csr, Record: record, EntryRevision: revision},
		}})
		if err != nil {
			t.Fatal(err)
		}
		jwt, err := door.SignJWT(t.Context(), &ententev1.SignJWTRequest{Requests: []*ententev1.JWTRequest{
			{EntryId: "service/accounts", Audience: []string{"vault"}, Record: record, EntryRevision: revision},
		}})
		if err != nil {
			t.Fatal(err)
		}
		wit, err := door.SignWIT(t.Context(), &ententev1.SignWITRequest{Requests: []*ententev1.WITRequest{
			{EntryId: "service/accounts", Csr: csr, Record: record, EntryRevision: revision},
		}})
		if err != nil {
			t.Fatal(err)
		}
		one := x509.GetResults()[0]
		return map[string]*ententev1.TokenResult{
			"X.509": {Token: strings.Repeat("x", len(one.GetCertificates())), Code: one.GetCode(), Error: one.GetError()},
			"JWT":   jwt.GetResults()[0], "WIT": wit.GetResults()[0],
		}
	}
	hash := func(e *statev1.Entry) []byte { h := ca.RecordHash(e); return h[:] }

	for kind, got := range sign(hash(own), own.GetRevision()) {
		if got.GetCode() != 0 || got.GetToken() == "" {
			t.Errorf("control: %s under its own record: %v", kind, got)
		}
	}
	lie := proto.CloneOf(own)
	lie.Selectors = []string{"unix:uid:2000"}
	for _, c := range []struct {
		name     string
		record   []byte
		revision uint64
	}{
		{"other selectors", hash(lie), own.GetRevision()},
		{"a former record", hash(lie), own.GetRevision() - 1},
		{"no hash at all", []byte{1}, own.GetRevision()},
	} {
		for kind, got := range sign(c.record, c.revision) {
			if codes.Code(got.GetCode()) != codes.FailedPrecondition || got.GetToken() != "" || !strings.Contains(got.GetError(), "another record") {
				t.Errorf("%s, %s: %v", c.name, kind, got)
			}
		}
	}

	// What the requester has seen and this node has not is waited for, not for long.
	began := time.Now()
	ahead := proto.CloneOf(own)
	ahead.Revision += 1 << 30
	if got := sign(hash(ahead), ahead.GetRevision())["X.509"]; codes.Code(got.GetCode()) != codes.FailedPrecondition {
		t.Errorf("of the future: %v", got)
	}
	if took := time.Since(began); took < time.Second || took > 8*time.Second { // three calls
		t.Errorf("waited %v", took)
	}
	change := make(chan uint64, 1)
	go func() {
		time.Sleep(100 * time.Millisecond)
		change <- c.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: accounts}\nspec: {run: {uid: 2000, hosts: [h1]}}\n")
	}()
	next := proto.CloneOf(own)
	next.Selectors = []string{"unix:uid:2000"}
	c.Node().Read(func(st *domain.State) { next.Revision = st.Revision() + 1 })
	got := sign(hash(next), next.GetRevision())["X.509"]
	if at := <-change; at >= next.GetRevision() { // other commands may have come between
		c.Node().Read(func(st *domain.State) { next, _ = st.Entry("service/accounts") })
		got = sign(hash(next), next.GetRevision())["X.509"]
	}
	if got.GetCode() != 0 {
		t.Errorf("control: once it was agreed: %v", got)
	}
}

// Whoever names no record is answered, being of the release before; but not who said that
// its software is newer.
func TestSignWithoutARecord(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: accounts}\nspec: {run: {uid: 1000, hosts: [h1]}}\n")
	shown := attest(t, c, "h1")
	conn := dial(t, c, &shown)
	csr := csrOf(t, newKey(t))
	sign := func() codes.Code {
		t.Helper()
		resp, err := ententev1.NewSignClient(conn).SignX509(t.Context(), &ententev1.SignX509Request{Requests: []*ententev1.X509Request{
			{EntryId: "service/accounts", Csr: csr},
		}})
		if err != nil {
			t.Fatal(err)
		}
		return codes.Code(resp.GetResults()[0].GetCode())
	}
	if got := sign(); got != codes.OK {
		t.Errorf("without a session: %v", got)
	}
	for connect, level := range []uint32{0, ca.SyncLevel} {
		stream, err := ententev1.NewSyncClient(conn).Sync(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&ententev1.SyncRequest{Message: &ententev1.SyncRequest_Hello{Hello: &ententev1.Hello{
			BootId: "b", Connect: uint64(connect + 1), Level: level,
		}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		want := codes.OK
		if level > 0 {
			want = codes.FailedPrecondition
		}
		if got := sign(); got != want {
			t.Errorf("a session of level %d: %v, want %v", level, got, want)
		}
	}
}
