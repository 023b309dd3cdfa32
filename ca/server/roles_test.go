package server_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
)

const administrators = `
apiVersion: entente/v1
kind: RoleBinding
metadata: {name: pay}
spec: {role: service-owner, subjects: [/people/pia], prefixes: [/team/pay]}
---
apiVersion: entente/v1
kind: RoleBinding
metadata: {name: looking}
spec: {role: viewer, subjects: [/people/vic]}
---
apiVersion: entente/v1
kind: RoleBinding
metadata: {name: trust}
spec: {role: trust-admin, subjects: [/people/tom]}
`

// office is a domain with a host on which people have identities.
type office struct {
	t    *testing.T
	ca   *catest.CA
	host tls.Certificate
}

func newOffice(t *testing.T, o catest.Options) *office {
	return openOffice(t, catest.Start(t, o))
}

func openOffice(t *testing.T, c *catest.CA) *office {
	f := &office{t: t, ca: c}
	f.ca.Apply(twoHosts + "---" + administrators)
	for i, who := range []string{"pia", "vic", "tom", "nobody"} {
		f.entry(f.ca.Admin(), "people-"+who, "/people/"+who, "desk", 2000+i)
	}
	f.entry(f.ca.Admin(), "other", "/team/payments/job", "h1", 3000)
	f.host = attest(t, f.ca, "desk")
	return f
}

func change(name, path, host string, uid int) *statev1.EntryChange {
	return &statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: &statev1.Entry{
		Id: "entry/" + name, Path: path, Hosts: []string{host}, Selectors: []string{fmt.Sprintf("unix:uid:%d", uid)},
	}}}
}

func (f *office) entry(admin ententev1.AdminClient, name, path, host string, uid int) {
	f.t.Helper()
	if err := changeOne(f.t, admin, change(name, path, host, uid)); err != nil {
		f.t.Fatal(err)
	}
}

// changeOne is the answer to one change.
func changeOne(t *testing.T, admin ententev1.AdminClient, c *statev1.EntryChange) error {
	r, err := admin.ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: []*statev1.EntryChange{c}})
	if err != nil {
		return err
	}
	return status.Error(codes.Code(r.GetResults()[0].GetCode()), r.GetResults()[0].GetError())
}

// svid is what a person shows.
func (f *office) svid(who string) tls.Certificate {
	f.t.Helper()
	cert, err := sign(f.t, dial(f.t, f.ca, &f.host), "entry/people-"+who, newKey(f.t))
	if err != nil {
		f.t.Fatal(err)
	}
	return cert
}

func (f *office) as(who string) ententev1.AdminClient {
	cert := f.svid(who)
	return ententev1.NewAdminClient(dial(f.t, f.ca, &cert))
}

// Administrators over the network, method by method.
func TestAdministratorsByTheirRoles(t *testing.T) {
	t.Parallel()
	f := newOffice(t, catest.Options{})
	need := map[string]string{ // who is let through
		"Status": "pia vic tom", "GetBundle": "pia vic tom", "ListObjects": "pia vic tom", "ListEntries": "pia vic tom", "CountEntries": "pia vic tom", "GetEntry": "pia vic tom",
		"Apply": "pia vic tom", "ChangeEntries": "pia vic tom", // and looked at there
		"ListNodes": "vic tom", "ListAuthorities": "vic tom", "ListAgents": "vic tom", "GetAgent": "vic tom", "ListTokens": "vic tom",
		"CreateToken": "tom", "RevokeToken": "tom", "BanAgent": "tom", "EvictAgent": "tom", "IsolateAgent": "tom", "PrepareAuthority": "tom", "ActivateAuthority": "tom",
		"TaintAuthority": "tom", "RevokeAuthority": "tom", "RemoveNode": "tom", "PromoteNode": "tom", "SaveSnapshot": "tom", "ListChanges": "vic tom", "ApproveChange": "", "ReplaceRecoveryKey": "",
		"ResetFederation": "tom", "RefreshFederation": "tom",
		"WhoAmI": "pia vic tom nobody",
	}
	people := map[string]*grpc.ClientConn{}
	for _, who := range []string{"pia", "vic", "tom", "nobody"} {
		cert := f.svid(who)
		people[who] = dial(t, f.ca, &cert)
	}
	call := func(method string) {
		allowed, known := need[method]
		if !known {
			t.Errorf("%s: which right does it need? Give it a row in methods (methods.go) and here", method)
			return
		}
		for who, conn := range people {
			var err error
			if method == "SaveSnapshot" {
				var stream ententev1.Admin_SaveSnapshotClient
				if stream, err = ententev1.NewAdminClient(conn).SaveSnapshot(t.Context(), &ententev1.SaveSnapshotRequest{}); err == nil {
					_, err = stream.Recv()
				}
			} else {
				err = conn.Invoke(t.Context(), "/entente.v1.Admin/"+method, &ententev1.StatusRequest{}, &ententev1.StatusRequest{})
			}
			refused := status.Code(err) == codes.PermissionDenied
			if may := strings.Contains(allowed, who); may == refused {
				t.Errorf("%s by %s: %v", method, who, err)
			}
		}
	}
	for _, m := range ententev1.Admin_ServiceDesc.Methods {
		call(m.MethodName)
	}
	for _, m := range ententev1.Admin_ServiceDesc.Streams {
		call(m.StreamName)
	}
}

// A service owner at work, and what he tries beyond his prefix.
func TestServiceOwnerStaysBelowHisPrefix(t *testing.T) {
	t.Parallel()
	f := newOffice(t, catest.Options{})
	pia := f.as("pia")
	f.entry(pia, "mine", "/team/pay/job", "h1", 4000)
	for what, c := range map[string]*statev1.EntryChange{
		"another's":             change("x", "/team/payments/x", "h1", 4001),
		"dot segments":          change("x", "/team/pay/../payments/x", "h1", 4001),
		"a reserved name":       change("x", "/entente/agent/h1", "h1", 4001),
		"a trust-admin's name":  change("x", "/people/tom", "desk", 4001),
		"another's process":     change("x", "/team/pay/x", "h1", 3000),
		"another's service":     change("x", "/team/pay/x", "h1", 1000),
		"delete another's":      {Action: &statev1.EntryChange_Delete{Delete: "entry/other"}},
		"move out":              {Action: &statev1.EntryChange_Update{Update: &statev1.Entry{Id: "entry/mine", Path: "/people/tom", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:4000"}}}},
		"take over":             {Action: &statev1.EntryChange_Update{Update: &statev1.Entry{Id: "entry/other", Path: "/team/pay/x", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:4000"}}}},
		"the trust-admin's own": {Action: &statev1.EntryChange_Delete{Delete: "entry/people-tom"}},
	} {
		if err := changeOne(t, pia, c); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := pia.Apply(t.Context(), &ententev1.ApplyRequest{Objects: []*statev1.Object{{Kind: &statev1.Object_RoleBinding{RoleBinding: &statev1.RoleBinding{
		Name: "more", Role: statev1.AdminRole_ADMIN_ROLE_TRUST_ADMIN, Subjects: []string{"/people/pia"},
	}}}}})
	wantCode(t, "a role for herself", err, codes.PermissionDenied)

	// She is shown what is hers.
	list, err := pia.ListEntries(t.Context(), &ententev1.ListEntriesRequest{})
	if err != nil || len(list.GetEntries()) != 1 || list.GetEntries()[0].GetId() != "entry/mine" {
		t.Errorf("listed: %v, %v", list, err)
	}
	_, err = pia.GetEntry(t.Context(), &ententev1.GetEntryRequest{Id: "entry/other"})
	wantCode(t, "another's entry", err, codes.NotFound)

	// Controls: she may take her own away; somebody else may do the rest.
	if err := changeOne(t, pia, &statev1.EntryChange{Action: &statev1.EntryChange_Delete{Delete: "entry/mine"}}); err != nil {
		t.Errorf("control: %v", err)
	}
	tom := f.as("tom")
	f.entry(tom, "x", "/team/payments/x", "h1", 4001)
	if _, err := tom.GetEntry(t.Context(), &ententev1.GetEntryRequest{Id: "entry/other"}); err != nil {
		t.Errorf("control: %v", err)
	}
	who, err := pia.WhoAmI(t.Context(), &ententev1.WhoAmIRequest{})
	if err != nil || who.GetWho() != "spiffe://banking.example/people/pia" || who.GetOperator() || len(who.GetBindings()) != 1 {
		t.Errorf("whoami: %v, %v", who, err)
	}
	lines, raw := auditLines(t, f.ca)
	for _, want := range []string{`"who":"spiffe://banking.example/people/pia","what":"ChangeEntries","on":["created entry/mine"],"result":"done"`,
		`"who":"spiffe://banking.example/people/pia","what":"ChangeEntries","on":["refused entry/other: forbidden`,
		`"who":"spiffe://banking.example/people/pia","what":"Apply","on":["RoleBinding/more"],"result":"refused"`} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("no %s in the audit log of %d lines", want, len(lines))
		}
	}
}

// Identities that are no administrators', each beside the same person's that is.
func TestWhoIsNoAdministrator(t *testing.T) {
	t.Parallel()
	f := newOffice(t, catest.Options{})
	other := newOffice(t, catest.Options{TrustDomain: "trading.example"})
	tom := f.svid("tom")
	see := func(cert tls.Certificate) codes.Code {
		_, err := ententev1.NewAdminClient(dial(t, f.ca, &cert)).ListAgents(t.Context(), &ententev1.ListAgentsRequest{})
		return status.Code(err)
	}
	if got := see(tom); got != codes.OK {
		t.Fatalf("control: %s", got)
	}
	if got := see(f.host); got != codes.PermissionDenied {
		t.Errorf("the agent of his host: %s", got)
	}
	if got := see(other.svid("tom")); got != codes.Unavailable { // the handshake fails
		t.Errorf("the namesake of another domain: %s", got)
	}
	if got := see(f.svid("nobody")); got != codes.PermissionDenied {
		t.Errorf("somebody without a role: %s", got)
	}
	stolen := tom
	stolen.PrivateKey, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if got := see(stolen); got == codes.OK {
		t.Error("his certificate with another key")
	}

	// What ends his identity ends his power, on an open connection too.
	ending := map[string]func(){
		"his entry was deleted and made anew": func() {
			if err := changeOne(t, f.ca.Admin(), &statev1.EntryChange{Action: &statev1.EntryChange_Delete{Delete: "entry/people-tom"}}); err != nil {
				t.Fatal(err)
			}
			f.entry(f.ca.Admin(), "people-tom", "/people/tom", "desk", 2002)
		},
		"his binding is gone": func() {
			if _, err := f.ca.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Deletes: []*statev1.ObjectKey{{Kind: "RoleBinding", Name: "trust"}}}); err != nil {
				t.Fatal(err)
			}
		},
		"his host is banned": func() {
			if _, err := f.ca.Admin().BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "desk"}); err != nil {
				t.Fatal(err)
			}
		},
	}
	for _, what := range []string{"his entry was deleted and made anew", "his binding is gone", "his host is banned"} {
		tom := f.svid("tom")
		open := ententev1.NewAdminClient(dial(t, f.ca, &tom))
		if _, err := open.ListAgents(t.Context(), &ententev1.ListAgentsRequest{}); err != nil {
			t.Fatalf("%s: control: %v", what, err)
		}
		ending[what]()
		if _, err := open.ListAgents(t.Context(), &ententev1.ListAgentsRequest{}); err == nil {
			t.Errorf("%s: his open connection still serves him", what)
		}
		if got := see(tom); got == codes.OK {
			t.Errorf("%s: a new connection serves him", what)
		}
		if what == "his binding is gone" {
			f.ca.Apply(administrators)
		}
	}
}

// An administrator whose SVID has ended.
func TestEndedAdministrator(t *testing.T) {
	t.Parallel()
	f := newOffice(t, catest.Options{Lifetimes: node.Lifetimes{X509SVID: 3 * time.Second, AgentSVID: time.Hour}})
	tom := f.svid("tom")
	admin := ententev1.NewAdminClient(dial(t, f.ca, &tom))
	if _, err := admin.ListAgents(t.Context(), &ententev1.ListAgentsRequest{}); err != nil {
		t.Fatalf("control: %v", err)
	}
	time.Sleep(time.Until(parseLeaf(t, tom.Certificate[0]).NotAfter) + 100*time.Millisecond)
	if _, err := admin.ListAgents(t.Context(), &ententev1.ListAgentsRequest{}); err == nil {
		t.Error("his open connection outlives his SVID")
	}
	if _, err := f.as("tom").ListAgents(t.Context(), &ententev1.ListAgentsRequest{}); err != nil {
		t.Errorf("control: a fresh SVID: %v", err)
	}
}

// A member forwards what an administrator asks of it. It cannot give him more than his
// roles, and what it claims stands in the leader's audit log beside its own name.
func TestMemberForwardsAdministrators(t *testing.T) {
	t.Parallel()
	f := newOffice(t, catest.Options{})
	cert := memberCertificate(t, f.ca)
	peers := ententev1.NewPeerClient(dial(t, f.ca, &cert))
	propose := func(principal string, name, path string) *ententev1.ProposeResponse {
		t.Helper()
		command, err := proto.Marshal(&statev1.Command{
			Actor: "spiffe://banking.example" + principal, Principal: principal,
			Body: &statev1.Command_ChangeEntries{ChangeEntries: &statev1.ChangeEntries{Changes: []*statev1.EntryChange{change(name, path, "h7", 1)}}},
		})
		if err != nil {
			t.Fatal(err)
		}
		r, err := peers.Propose(t.Context(), &ententev1.ProposeRequest{Command: command})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := propose("/people/pia", "a", "/team/pay/a"); r.GetRefusal() != "" {
		t.Errorf("control: %v", r)
	}
	if r := propose("/people/pia", "b", "/team/payments/b"); r.GetRefusal() != "forbidden" {
		t.Errorf("beyond her prefix: %v", r)
	}
	if r := propose("/entente/agent/desk", "b", "/team/pay/b"); r.GetRefusal() != "forbidden" {
		t.Errorf("an agent: %v", r)
	}
	_, raw := auditLines(t, f.ca)
	for _, want := range []string{`"who":"spiffe://banking.example/people/pia","via":"CA node ca-1 (` + f.ca.Node().ID() + `)","what":"ChangeEntries","on":["entry/a"],"result":"done"`,
		`"who":"spiffe://banking.example/people/pia","via":"CA node ca-1 (` + f.ca.Node().ID() + `)","what":"ChangeEntries","on":["entry/b"],"result":"refused"`} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("no %s in\n%s", want, raw)
		}
	}
}
