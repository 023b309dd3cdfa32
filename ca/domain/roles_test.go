package domain

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/roles"
)

func binding(name string, role statev1.AdminRole, subject string, prefixes ...string) *statev1.Object {
	return &statev1.Object{Kind: &statev1.Object_RoleBinding{RoleBinding: &statev1.RoleBinding{
		Name: name, Role: role, Subjects: []string{subject}, Prefixes: prefixes,
	}}}
}

const (
	viewer       = statev1.AdminRole_ADMIN_ROLE_VIEWER
	serviceOwner = statev1.AdminRole_ADMIN_ROLE_SERVICE_OWNER
	apiOwner     = statev1.AdminRole_ADMIN_ROLE_API_OWNER
	trustAdmin   = statev1.AdminRole_ADMIN_ROLE_TRUST_ADMIN
)

// as has a command carried out in an administrator's name.
func as(path string, cmd *statev1.Command) *statev1.Command {
	cmd = proto.CloneOf(cmd)
	cmd.Principal = path
	return cmd
}

func at(o *statev1.Object, path, uid string, exports ...string) *statev1.Object {
	s := o.GetService()
	s.Path, s.Selectors, s.ExportTo = path, []string{"unix:uid:" + uid}, exports
	return o
}

func uid(e *statev1.Entry, uid string) *statev1.Entry {
	e.Selectors = []string{"unix:uid:" + uid}
	return e
}

func agreement(name string, allow *statev1.Allow, gateways ...*statev1.PeerGateway) *statev1.Object {
	return &statev1.Object{Kind: &statev1.Object_Agreement{Agreement: &statev1.Agreement{
		Name: name, Peer: "trading.example", Expires: epochTime.AddDate(1, 0, 0).Unix(), Gateways: gateways, Allow: []*statev1.Allow{allow},
	}}}
}

var (
	knownGateway = &statev1.PeerGateway{Path: "/entente/gateway/gw-1", Datacenter: "dc1", Address: "10.1.0.1:8443"}
	otherGateway = &statev1.PeerGateway{Path: "/entente/gateway/gw-9", Datacenter: "dc1", Address: "10.1.0.9:8443"}
	forAccounts  = &statev1.Allow{Callers: []string{"portfolio"}, Service: "accounts"}
	forLedger    = &statev1.Allow{Callers: []string{"portfolio"}, Service: "ledger"}
)

// administered is a domain with two teams and people with every role:
//
//	pia   service-owner of /team/pay       ann  api-owner of /team/pay
//	olaf  service-owner of everything      eva  api-owner of everything
//	vic   viewer of /team/pay              tom  trust-admin
func administered(t *testing.T) *world {
	w := newWorld(t)
	w.must(level("n1", 3))
	w.must(w.agentToken("t1", "h1", 1e15))
	w.must(w.attest("t1", keyID("h1")))
	w.must(objects(
		binding("pia", serviceOwner, "/people/pia", "/team/pay"), binding("ann", apiOwner, "/people/ann", "/team/pay"),
		binding("olaf", serviceOwner, "/people/olaf"), binding("eva", apiOwner, "/people/eva"),
		binding("vic", viewer, "/people/vic", "/team/pay"), binding("tom", trustAdmin, "/people/tom"),
		binding("bot", viewer, "/team/pay/bot"),
		relationship("trading.example"),
		at(service("accounts", "h1"), "/team/pay/accounts", "1", "trading.example"), at(service("ledger", "h1"), "/team/payments/ledger", "2", "trading.example"),
		agreement("known", forLedger, knownGateway),
	))
	w.must(entries(create(uid(entry("job", "/team/pay/job", "h1"), "11")), create(uid(entry("other", "/team/payments/job", "h1"), "12")),
		create(uid(entry("bot", "/team/pay/bot", "h1"), "13")), create(uid(entry("tom", "/people/tom", "h1"), "14"))))
	return w
}

// What each role allows and what it does not; every refusal is of the roles alone, since
// somebody else has the same carried out.
func TestRolesDecide(t *testing.T) {
	withDNS := uid(entry("dns", "/team/pay/dns", "h1"), "21")
	withDNS.DnsNames = []string{"pay.example.com"}
	federating := uid(entry("fed", "/team/pay/fed", "h1"), "22")
	federating.FederatesWith = []string{"trading.example"}
	exported := at(service("cards", "h2"), "/team/pay/cards", "31", "trading.example")
	tests := []struct {
		name string
		cmd  *statev1.Command
		may  string // people
	}{
		{"an entry below the prefix", entries(create(uid(entry("a", "/team/pay/a", "h1"), "20"))), "pia olaf tom"},
		{"an entry at the prefix", entries(create(uid(entry("a", "/team/pay", "h1"), "20"))), "pia olaf tom"},
		{"a prefix is whole segments", entries(create(uid(entry("a", "/team/payments/a", "h1"), "20"))), "olaf tom"},
		{"above the prefix", entries(create(uid(entry("a", "/team", "h1"), "20"))), "olaf tom"},
		{"other letters", entries(create(uid(entry("a", "/Team/pay/a", "h1"), "20"))), "olaf tom"},
		{"the owner's entry", entries(deleteEntry("entry/job")), "pia olaf tom"},
		{"another owner's entry", entries(deleteEntry("entry/other")), "olaf tom"},
		{"out of the prefix", entries(update(uid(entry("job", "/team/payments/x", "h1"), "11"), 0)), "olaf tom"},
		{"into the prefix", entries(update(uid(entry("other", "/team/pay/x", "h1"), "12"), 0)), "olaf tom"},
		{"one of two is another's", entries(deleteEntry("entry/job"), deleteEntry("entry/other")), "olaf tom"},
		{"DNS names", entries(create(withDNS)), "olaf tom"},
		{"federation", entries(create(federating)), "tom"},

		{"a process of another owner", entries(create(uid(entry("a", "/team/pay/a", "h1"), "12"))), "olaf tom"},
		{"a service of another owner", entries(create(uid(entry("a", "/team/pay/a", "h1"), "2"))), "olaf tom"},
		{"a process that another owner's may be", entries(create(&statev1.Entry{Id: "entry/a", Path: "/team/pay/a", Hosts: []string{"h1"}, Selectors: []string{"unix:user:app"}})), "olaf tom"},
		{"the same on a host of its own", entries(create(uid(entry("a", "/team/pay/a", "h9"), "12"))), "pia olaf tom"},
		{"onto a host where another owner is", entries(update(&statev1.Entry{Id: "entry/job", Path: "/team/pay/job", Hosts: []string{"h1"}, Selectors: []string{"unix:sha256:" + strings.Repeat("0", 64)}}, 0)), "olaf tom"},
		{"a service for another owner's process", objects(at(service("x", "h1"), "/team/pay/x", "12")), "olaf tom"},

		{"the entry that a role is bound to", entries(update(uid(entry("bot", "/team/pay/bot", "h1"), "20"), 0)), "tom"},
		{"another entry for it", entries(create(uid(entry("a", "/team/pay/bot", "h1"), "20"))), "tom"},
		{"a service for it", objects(at(service("x", "h1"), "/team/pay/bot", "20")), ""}, // the entry has the path
		{"the trust-admin's entry", entries(update(uid(entry("tom", "/people/tom", "h1"), "20"), 0)), "tom"},

		{"a service", objects(at(service("x", "h2"), "/team/pay/x", "31")), "pia olaf tom"},
		{"a service elsewhere", objects(at(service("x", "h2"), "/team/payments/x", "31")), "olaf tom"},
		{"an exported service", objects(exported), "tom"},
		{"its own service", objects(at(service("accounts", "h1", "h2"), "/team/pay/accounts", "1", "trading.example")), "pia olaf tom"},
		{"its exports", objects(at(service("accounts", "h1"), "/team/pay/accounts", "1")), "ann eva tom"},
		{"another's exports", objects(at(service("ledger", "h1"), "/team/payments/ledger", "2")), ""}, // an agreement rests on it
		{"another's service", objects(at(service("ledger", "h1", "h2"), "/team/payments/ledger", "2", "trading.example")), "olaf tom"},
		{"moved to another owner", objects(at(service("accounts", "h1"), "/team/payments/accounts", "1", "trading.example")), "olaf tom"},
		{"taken from another owner", objects(at(service("ledger", "h1"), "/team/pay/ledger", "2", "trading.example")), "olaf tom"},
		{"without its service", deletes("Service/accounts"), "pia olaf tom"},

		{"an agreement", objects(agreement("x", forAccounts, knownGateway)), "ann eva tom"},
		{"for another's service", objects(agreement("x", forLedger, knownGateway)), "eva tom"},
		{"another's agreement", objects(agreement("known", forAccounts, knownGateway)), "eva tom"},
		{"no more agreement of another's", deletes("Agreement/known"), "eva tom"},
		{"an unknown gateway", objects(agreement("x", forAccounts, otherGateway)), "eva tom"},
		{"own callers", objects(agreement("x", &statev1.Allow{Callers: []string{"team/pay/**"}, Service: "orders.trading.example"}, knownGateway), imported("orders.trading.example")), "eva tom"},
		{"an import", objects(imported("quotes.trading.example")), "eva tom"},

		{"a gateway", objects(gateway("gw-1", 0, "h1")), "tom"},
		{"a relationship", objects(relationship("other.example")), "tom"},
		{"roles for oneself", objects(binding("pia", trustAdmin, "/people/pia")), "tom"},
		{"more for oneself", objects(binding("x", serviceOwner, "/people/pia", "/team")), "tom"},
		{"another's role", deletes("RoleBinding/tom"), "tom"},
		{"a token", (&world{seeds: map[string][]byte{}, s: New()}).agentToken("t2", "h2", 1e15), "tom"},
		{"a host", ban("h1"), "tom"},
		{"a CA node", remove("n1", true), ""}, // the last voter
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for _, who := range []string{"pia", "ann", "olaf", "eva", "vic", "tom", "nobody"} {
				w := administered(t)
				out := w.apply(as("/people/"+who, test.cmd))
				switch may := strings.Contains(" "+test.may+" ", " "+who+" "); {
				case may && out.Refused != nil:
					t.Errorf("%s was refused: %v", who, out.Refused)
				case !may && out.Refused == nil:
					t.Errorf("%s was allowed", who)
				case !may && who != "tom" && test.may != "" && out.Refused.Code != CodeForbidden:
					t.Errorf("%s: %v", who, out.Refused)
				}
			}
			if out := administered(t).apply(test.cmd); test.may != "" && out.Refused != nil {
				t.Errorf("control: an operator was refused: %v", out.Refused)
			}
		})
	}
}

func imported(name string) *statev1.Object {
	return &statev1.Object{Kind: &statev1.Object_Import{Import: &statev1.Import{Service: name}}}
}

// On the calling side an agreement is about callers.
func TestAPIOwnerOfCallers(t *testing.T) {
	w := administered(t)
	w.must(objects(imported("orders.trading.example")))
	for callers, may := range map[string]bool{
		"team/pay": true, "team/pay/x": true, "team/pay/*": true, "team/pay/**": true,
		"**": false, "*": false, "team/*": false, "team/payments": false, "team/*/x": false, "team/pay*": false, "team/pay/../x": false,
	} {
		allow := &statev1.Allow{Callers: []string{callers}, Service: "orders.trading.example"}
		out := w.apply(as("/people/ann", objects(agreement("mine", allow, knownGateway))))
		if refused := out.Refused != nil && out.Refused.Code == CodeForbidden; refused == may {
			t.Errorf("%s: %v", callers, out.Refused)
		}
	}
}

// A role that was taken away counts no more when the command's turn comes.
func TestRolesAreAskedWhenTheCommandIsCarriedOut(t *testing.T) {
	w := administered(t)
	change := as("/people/pia", entries(create(uid(entry("a", "/team/pay/a", "h1"), "20"))))
	if refusal := w.s.Administrator("/people/pia").MayCarryOut(change); refusal != nil {
		t.Fatalf("control: the door lets it through: %v", refusal)
	}
	w.must(as("/people/tom", deletes("RoleBinding/pia")))
	w.refused(change, CodeForbidden)
}

// Bindings that would make an administrator of what the mesh itself runs, or say nothing.
func TestRoleBindingsAreChecked(t *testing.T) {
	w := administered(t)
	for name, b := range map[string]*statev1.Object{
		"an agent":                 binding("x", trustAdmin, ca.AgentPath("h1")),
		"a gateway":                binding("x", viewer, ca.GatewayPath("gw-1")),
		"a reserved prefix":        binding("x", serviceOwner, "/people/x", "/entente"),
		"a trailing slash":         binding("x", serviceOwner, "/people/x", "/team/"),
		"dot segments":             binding("x", serviceOwner, "/people/x", "/team/../people"),
		"the empty prefix":         binding("x", serviceOwner, "/people/x", ""),
		"a pattern":                binding("x", serviceOwner, "/people/x", "/team/*"),
		"a trust-admin of a place": binding("x", trustAdmin, "/people/x", "/team/pay"),
		"no role":                  binding("x", 0, "/people/x"),
		"a role of the future":     binding("x", 99, "/people/x"),
		"another domain":           binding("x", viewer, "spiffe://trading.example/people/x"),
	} {
		if refusal := w.refused(objects(b), CodeInvalid); refusal == nil {
			t.Error(name)
		}
	}
	w.must(objects(binding("x", serviceOwner, "/people/x", "/team/x"))) // control
}

func TestRights(t *testing.T) {
	w := administered(t)
	for who, want := range map[string][3]bool{ // See, SeeAll, Govern
		"tom": {true, true, true}, "olaf": {true, true, false}, "eva": {true, true, false}, "pia": {true, false, false}, "vic": {true, false, false}, "nobody": {},
	} {
		a := w.s.Administrator("/people/" + who)
		for i, right := range []roles.Right{roles.See, roles.SeeAll, roles.Govern} {
			if got := a.May(right) == nil; got != want[i] {
				t.Errorf("%s, right %d: %v", who, right, got)
			}
		}
	}
	if (&Administrator{}).May(roles.See) == nil || (&Administrator{}).MayCarryOut(ban("h1")) == nil || (&Administrator{}).Sees("/team/pay/a") || w.s.Administrator("").May(roles.See) == nil {
		t.Error("nobody in particular is an administrator")
	}
	if a := w.s.Administrator("/people/vic"); !a.Sees("/team/pay/a") || a.Sees("/team/payments/a") {
		t.Error("a viewer sees what its prefix covers")
	}
}

// Scope and node selectors of a token decide what its host may hold.
func TestHostsHoldWhatTheyAreEntitledTo(t *testing.T) {
	w := newWorld(t)
	w.must(level("n1", 3))
	token := func(id string, grant *statev1.AgentGrant) *statev1.Command {
		grant.Name, grant.Datacenter, grant.Addresses = "h1", "dc1", []string{"127.1.0.9"}
		return w.token(id, &statev1.Token{Grant: &statev1.Token_Agent{Agent: grant}}, 1e15)
	}
	w.refused(token("bad", &statev1.AgentGrant{Selectors: []string{"x509pop:subject:cn:h1"}}), CodeInvalid) // not a token's to say
	w.refused(token("bad", &statev1.AgentGrant{PathPrefixes: []string{"/team/"}}), CodeInvalid)
	w.must(token("t1", &statev1.AgentGrant{Selectors: []string{"token:pci"}, PathPrefixes: []string{"/team/pay"}}))
	w.must(w.attest("t1", keyID("h1")))
	demanding := func(name, path string, selectors ...string) *statev1.Entry {
		e := entry(name, path, "h1")
		e.NodeSelectors = selectors
		return e
	}
	w.must(entries(create(entry("in", "/team/pay/a", "h1")), create(entry("out", "/team/payments/a", "h1")),
		create(demanding("has", "/team/pay/b", "token:pci")), create(demanding("lacks", "/team/pay/c", "token:pci", "token:hsm")), create(entry("elsewhere", "/team/pay/d", "h2"))))
	var held []string
	for _, e := range w.s.HeldBy("h1") {
		held = append(held, e.GetId())
	}
	if got := strings.Join(held, " "); got != "entry/has entry/in" {
		t.Errorf("held: %s", got)
	}
	if w.s.HeldBy("h2") != nil && len(w.s.HeldBy("h2")) > 0 {
		t.Error("a host that was not attested holds something")
	}
	w.must(ban("h1"))
	if len(w.s.HeldBy("h1")) > 0 {
		t.Error("a banned host holds something")
	}
}

// A certificate admits one key as one agent, until that is evicted.
func TestACertificateAdmitsOneAgent(t *testing.T) {
	w := newWorld(t)
	w.must(level("n1", 3))
	w.must(admit("h1", "k1", "c1"))
	w.unchanged(admit("h1", "k1", "c1"))
	w.refused(admit("h1", "k2", "c1"), CodeExists) // who copied the certificate's key
	w.refused(admit("h2", "k2", "c1"), CodeExists) // the template changed meanwhile
	w.refused(admit("h1", "k2", "c2"), CodeExists) // another certificate of the same name
	w.refused(admit("h2", "k1", "c2"), CodeExists) // one key, two agents
	w.must(admit("h2", "k2", "c2"))                // control
	w.must(admit("h1", "k1", "c3"))                // the host's certificate was renewed
	w.must(ban("h1"))
	w.refused(admit("h1", "k1", "c3"), CodeAgentBanned)
	w.refused(admit("h1", "k9", "c9"), CodeAgentBanned)
	w.must(evict("h1"))
	w.must(admit("h1", "k9", "c3"))
	for name, bad := range map[string]func(*statev1.Agent){
		"name": func(a *statev1.Agent) { a.Name = "H.1" }, "datacenter": func(a *statev1.Agent) { a.Datacenter = "" }, "key": func(a *statev1.Agent) { a.KeyId = "x" },
		"certificate": func(a *statev1.Agent) { a.Certificate = "" }, "selectors": func(a *statev1.Agent) { a.Selectors = []string{"token:pci"} },
		"address": func(a *statev1.Agent) { a.Addresses = []string{"a b"} }, "generation": func(a *statev1.Agent) { a.Generation = 1 }, "banned": func(a *statev1.Agent) { a.Banned = true },
	} {
		cmd := admit("h5", "k5", "c5")
		bad(cmd.GetAdmitAgent().GetAgent())
		if w.refused(cmd, CodeInvalid) == nil {
			t.Error(name)
		}
	}
}

// A change that comes in parts is asked about as a whole, when it is carried out.
func TestStagedChangesAskForRoles(t *testing.T) {
	w := administered(t)
	w.must(as("/people/pia", stage(1, 0, at(service("x", "h2"), "/team/payments/x", "31"))))
	w.refused(as("/people/pia", applyStaged(1, 1)), CodeForbidden)
	w.must(as("/people/olaf", applyStaged(1, 1))) // control
}

// Members of an earlier release do not know roles: nothing of them gets into a log.
func TestRolesWaitForTheFeatureLevel(t *testing.T) {
	w := newWorld(t)
	e := entry("a", "/a", "h1")
	e.NodeSelectors = []string{"token:pci"}
	token := w.agentToken("t1", "h1", 1e15)
	token.GetCreateToken().GetToken().GetAgent().PathPrefixes = []string{"/team"}
	for _, cmd := range []*statev1.Command{objects(binding("x", viewer, "/people/x")), entries(create(e)), token, as("/people/tom", ban("h1")),
		{Body: &statev1.Command_AdmitAgent{AdmitAgent: &statev1.AdmitAgent{}}}} {
		w.refused(cmd, CodeFeature)
	}
	w.must(level("n1", 3))
	w.must(objects(binding("x", viewer, "/people/x"))) // control
}

// Two paths may name one file, two names one user, and of one user's processes each can
// become the other: only numbers of users, units and containers keep an entry of one owner
// from a process of another.
func TestOnlyWhatAProcessHasOnceTellsOwnersApart(t *testing.T) {
	selected := func(name, path string, selectors ...string) *statev1.Entry {
		e := entry(name, path, "h7")
		e.Selectors = selectors
		return e
	}
	digest := func(c string) string { return strings.Repeat(c, 64) }
	of := []string{"unix:uid:1000", "unix:user:app", "unix:gid:5", "unix:path:/opt/current/app", "unix:sha256:" + digest("a"), "unix:cmdline:" + digest("a"), "systemd:unit:app.service", "container:id:" + digest("a")}
	for name, test := range map[string]struct {
		selectors []string
		apart     bool
	}{
		"a symbolic link to the same file": {[]string{"unix:uid:1000", "unix:path:/opt/v7/app"}, false},
		"another digest":                   {[]string{"unix:uid:1000", "unix:sha256:" + digest("b")}, false},
		"another command line":             {[]string{"unix:uid:1000", "unix:cmdline:" + digest("b")}, false},
		"another group":                    {[]string{"unix:uid:1000", "unix:gid:6"}, false},
		"the same":                         {[]string{"unix:uid:1000"}, false},
		"another user":                     {[]string{"unix:uid:1001"}, true},
		"another name, maybe of that user": {[]string{"unix:user:app@corp.example"}, false},
		"another user by name and number":  {[]string{"unix:user:web", "unix:uid:1001"}, true},
		"another unit":                     {[]string{"systemd:unit:web.service"}, true},
		"another container":                {[]string{"container:id:" + digest("b")}, true},
	} {
		t.Run(name, func(t *testing.T) {
			w := administered(t)
			w.must(entries(create(selected("theirs", "/team/payments/app", of...))))
			mine := func() *statev1.Command {
				return as("/people/pia", entries(create(selected("mine", "/team/pay/app", test.selectors...))))
			}
			if weak := !slices.Equal(test.selectors, []string{"unix:uid:1000"}); weak {
				// Below the level all members decide as the release before did.
				if refusal := w.s.Administrator("/people/pia").MayCarryOut(mine()); refusal != nil {
					t.Errorf("below the feature level: %v", refusal)
				}
			}
			w.must(level("n1", levelHardened))
			if !test.apart {
				w.refused(mine(), CodeForbidden)
				w.must(as("/people/olaf", entries(create(selected("mine", "/team/pay/app", test.selectors...))))) // control
				return
			}
			w.must(mine())
		})
	}
}

// The DNS name that an entry of one owner goes by is no service's of another, and the
// other way round. The controls are the owner's own names, and owners of everything.
func TestDNSNamesAreTheirOwners(t *testing.T) {
	named := func(name, path string) *statev1.Command { return objects(at(service(name, "h9"), path, "77")) }
	callsOnly := func(name string) *statev1.Command {
		s := at(service(name, "h9"), "/team/pay/caller", "77")
		s.GetService().Port, s.GetService().OutboundPort = 0, 9000
		return objects(s)
	}
	withPort := func(name string) *statev1.Command { return named(name, "/team/pay/caller") }
	for _, test := range []struct {
		name   string
		before *statev1.Command
		cmd    *statev1.Command
		pia    bool // may, at the level
	}{
		{"a service called as another owner's entry", nil, named("other", "/team/pay/x"), false},
		{"a service called as another owner's SPIFFE path", entries(create(uid(entry("x", "/cards", "h1"), "40"))), named("cards", "/team/pay/x"), false},
		{"a service called as nobody's entry", nil, named("cards", "/team/pay/x"), true},
		{"a service called as an own entry", nil, named("job", "/team/pay/x"), true},
		{"a service called as the last part of another owner's path", entries(create(uid(entry("x", "/team/payments/cards", "h1"), "40"))), named("cards", "/team/pay/x"), true},
		{"a service that has its name already", as("/people/tom", named("other", "/team/pay/x")), objects(at(service("other", "h9"), "/team/pay/y", "78")), true},
		{"a service that only calls", nil, callsOnly("other"), true},
		{"such a service that others are to call from now on", callsOnly("other"), withPort("other"), false},
		{"the same with a name of its own", callsOnly("cards"), withPort("cards"), true},
		{"an entry called as another owner's service", nil, entries(create(uid(entry("ledger", "/team/pay/x", "h9"), "77"))), false},
		{"an entry called as an own service", nil, entries(create(uid(entry("accounts", "/team/pay/x", "h9"), "77"))), true},
		{"two services, one called as another owner's entry", nil, objects(at(service("cards", "h9"), "/team/pay/c", "77"), at(service("other", "h9"), "/team/pay/x", "78")), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, who := range []string{"pia", "olaf", "tom"} {
				for _, hardened := range []bool{true, false} {
					w := administered(t)
					if test.before != nil {
						w.must(test.before)
					}
					if hardened {
						w.must(level("n1", levelHardened))
					}
					cmd := as("/people/"+who, test.cmd)
					if who != "pia" || test.pia || !hardened {
						w.must(cmd)
						continue
					}
					w.refused(cmd, CodeForbidden)
					if refusal := w.s.Administrator("/people/pia").MayCarryOut(cmd); refusal == nil || !strings.Contains(refusal.Error(), "of another owner: choose another") {
						t.Errorf("at the door: %v", refusal)
					}
				}
			}
		})
	}
}
