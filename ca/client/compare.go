package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/compare"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/peer"
)

const (
	lookEvery = time.Second
	askEvery  = 8 * time.Second // with jitter, a node whose statements do not arrive otherwise
	askWait   = 4 * time.Second // for its answer, with the connection

	// A statement that was passed on counts as young as its time says, by this host's clock
	// until the node was asked itself; one from the future by more than this does not count.
	clockSlack = 2 * time.Second
	// youngEnough: a node with a statement younger than this is not asked; one that is passed
	// on with each beat, every 5 s, is seldom older. It is asked long before that is too old
	// to count.
	youngEnough = 7500 * time.Millisecond
	// verifyEvery: while a node's last statement is younger, newer ones are not verified.
	verifyEvery = 4 * time.Second

	avoidFor     = 24 * time.Hour
	avoidLate    = 10 * time.Minute // who was late only: honest disks and links stall, too; doubled each time
	unheardAfter = time.Hour        // then nodes that nobody confirmed are compared with as well
	lastResort   = 30 * time.Second // without a session: then who was late only is used again
)

// errContradicted ends a session with a node that two others contradict.
var errContradicted = errors.New("two other CA nodes contradict it")

// Avoided is a CA node that two others contradicted.
type Avoided struct {
	ID, Name string
	Why      string
	By       []string // names of the two
	Until    time.Time
	Late     bool // it lacked what the others had, and contradicted nothing that it did have
}

// Comparison is what comparing the CA nodes came to.
type Comparison struct {
	Node    string   // name of the one whose words are compared; empty: nothing was compared yet
	Heard   []string // names of the others whose statements are fresh
	Doubt   string   // what the only other node in reach holds against it; empty: nothing
	DoubtBy string
	Avoided []Avoided
	Moves   int // sessions that ended since two nodes contradicted
}

// comparer hears what other CA nodes hold, and has Sync leave a node that two others
// contradict.
type comparer struct {
	*Client
	relayed chan []*ententev1.SignedStatement
	move    chan struct{} // holds one token when the session is to end
	answers chan answer
	comparing

	mu        sync.Mutex
	confirmed []*statev1.Member // the last table that two nodes agreed on
	to        []*statev1.Member // while moving: the two that contradict
	moving    bool              // until another node's full state is in use
	avoided   map[string]Avoided
	late      map[string]int  // how often a node was left for being late, by id
	alone     time.Time       // since when there is no session; zero: there is one
	gone      map[string]bool // ids of CA nodes that the only other one in reach does not know
	node      string          // id; empty: no session
	is        Comparison
}

// comparing is what comparer.run alone uses.
type comparing struct {
	judge   compare.Judge
	offsets map[string]time.Duration // a node's clock minus this host's, as of when it was asked
	heardAt map[string]time.Time     // when a node was heard last
	began   time.Time
	asking  bool
	nextAsk time.Time
	second  time.Time // until then no second node is asked at once again
	details time.Time // until then nobody is asked out of turn for what it denies
	last    string    // asked last
	only    string    // Decision.Differing of which the own node's items are more than the others'
	hashed  hashed    // of the view
}

// hashed are the parts of a view that were hashed last.
type hashed struct {
	members  []*statev1.Member
	jwks     []byte
	distrust uint64 // Store.told
	items    compare.DistrustSet
	content  compare.Content
}

type answer struct {
	id        string
	statement *compare.Statement
	cluster   *statev1.Cluster
	denials   *ententev1.DenialsResponse
	err       error
}

func newComparer(c *Client) *comparer {
	confirmed := c.cfg.Confirmed
	if len(confirmed) == 0 {
		confirmed = c.cfg.Members
	}
	return &comparer{
		Client: c, relayed: make(chan []*ententev1.SignedStatement, 1), move: make(chan struct{}, 1), answers: make(chan answer, 1),
		comparing: comparing{offsets: map[string]time.Duration{}, heardAt: map[string]time.Time{}},
		confirmed: slices.SortedFunc(slices.Values(confirmed), func(a, b *statev1.Member) int { return cmp.Compare(a.GetId(), b.GetId()) }), avoided: map[string]Avoided{}, late: map[string]int{}, alone: time.Now(),
	}
}

// Confirmed is the last member table that two CA nodes agreed on, to be kept over a
// restart.
func (c *Client) Confirmed() []*statev1.Member {
	c.compare.mu.Lock()
	defer c.compare.mu.Unlock()
	return c.compare.confirmed
}

// Comparison says what comparing the CA nodes came to.
func (c *Client) Comparison() Comparison {
	c.compare.mu.Lock()
	defer c.compare.mu.Unlock()
	is := c.compare.is
	is.Avoided = slices.SortedFunc(maps.Values(c.compare.avoided), func(a, b Avoided) int { return a.Until.Compare(b.Until) })
	return is
}

// relay takes the statements of a heartbeat; the newest count.
func (c *comparer) relay(list []*ententev1.SignedStatement) {
	const most = 16
	list = list[:min(len(list), most)]
	if len(list) == 0 {
		return
	}
	select {
	case <-c.relayed:
	default:
	}
	select {
	case c.relayed <- list:
	default:
	}
}

// at says to which node the session is; nil: there is none.
func (c *comparer) at(conn *conn) {
	id := ""
	if conn != nil {
		id = nodeID(conn.state)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.node = id
	if id == "" {
		c.alone = time.Now()
		return
	}
	if _, avoided := c.avoids(id); !avoided {
		delete(c.avoided, id) // it is the last resort
	}
	c.alone = time.Time{}
}

// avoids tells whether a node is not to be used. Called with mu held.
func (c *comparer) avoids(id string) (Avoided, bool) {
	a, avoided := c.avoided[id]
	now := time.Now()
	if !avoided || !now.Before(a.Until) {
		return a, false
	}
	return a, !a.Late || c.alone.IsZero() || now.Sub(c.alone) < lastResort
}

// nodeID is the id of the CA node at the other end: its key's.
func nodeID(state tls.ConnectionState) string {
	if len(state.PeerCertificates) == 0 {
		return ""
	}
	return peer.KeyID(state.PeerCertificates[0])
}

// contradicted are the names of the nodes that are avoided, at most 8.
func (c *comparer) contradicted() (names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.avoided {
		names = append(names, a.Name)
	}
	slices.Sort(names)
	return names[:min(len(names), 8)]
}

// refuses says why a node of the member table is not to be used now; while the client
// leaves one, known tells whether the key belongs to the last table that two agreed on.
func (c *comparer) refuses(keyID string) (known bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a, avoided := c.avoids(keyID); avoided {
		return false, fmt.Errorf("CA nodes %v contradict it, and it is avoided until %s", a.By, a.Until.UTC().Format(time.RFC3339))
	}
	if c.gone[keyID] {
		return false, errors.New("another CA node does not know it")
	}
	if !c.moving {
		return false, nil
	}
	is := func(m *statev1.Member) bool { return m.GetId() == keyID }
	if slices.ContainsFunc(c.confirmed, is) || slices.ContainsFunc(c.to, is) {
		return true, nil
	}
	return false, errors.New("no two CA nodes agreed that it is one")
}

// addresses are nodes to dial beside those of the member table, and addresses to leave out.
func (c *comparer) addresses() (more []*statev1.Member, not map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	not = map[string]bool{}
	for _, m := range c.confirmed {
		if _, avoided := c.avoids(m.GetId()); avoided {
			not[m.GetApiAddress()] = true
		}
	}
	if c.moving {
		more = append(slices.Clone(c.confirmed), c.to...)
	}
	return more, not
}

// dropped are nodes of the last table that two agreed on which the member table lacks, as
// long as there is no picture to compare, as after a restart. If one CA node alone said that
// they are none, its word must not last longer than it is in reach.
func (c *comparer) dropped() (list []*statev1.Member) {
	view := c.View()
	if view.Revision != 0 || len(view.Members) == 0 {
		return nil
	}
	for _, m := range c.Confirmed() {
		if !slices.ContainsFunc(view.Members, func(o *statev1.Member) bool { return o.GetId() == m.GetId() }) {
			list = append(list, m)
		}
	}
	return list
}

// arrived says that the full state of another node is in use.
func (c *comparer) arrived() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.moving, c.to, c.gone = false, nil, nil
}

// run compares until ctx ends.
func (c *comparer) run(ctx context.Context) error {
	var asks sync.WaitGroup
	defer asks.Wait()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	c.began = time.Now()
	c.nextAsk = c.began.Add(pause() / 2) // where the first heartbeat has brought statements, nobody
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case list := <-c.relayed:
			partners, _ := c.partners()
			for _, signed := range list {
				c.hear(signed, partners)
			}
		case a := <-c.answers:
			c.asking = false
			c.answered(a)
		case <-look.C:
			c.look(ctx, &asks)
		}
	}
}

// pause is askEvery with jitter, never longer.
func pause() time.Duration { return askEvery - rand.N(askEvery/4) }

// hear takes a statement that the own node passed on.
func (c *comparer) hear(signed *ententev1.SignedStatement, partners map[string]*statev1.Member) {
	s, err := compare.Read(signed)
	if err != nil || partners[s.Member] == nil || s.Epoch != c.View().Cluster.GetEpoch() {
		return // one of another epoch proves nothing by itself: the node is asked for the proof
	}
	now := time.Now()
	age := now.Add(c.offsets[s.Member]).Sub(s.Time)
	if age < -clockSlack || age > compare.Fresh {
		return // it was kept back, or one of the clocks is wrong: the node is asked itself
	}
	if last, known := c.judge.Age(s.Member, now); known && last < verifyEvery {
		return
	}
	if s, err = compare.Verify(c.View().Cluster.GetId(), signed); err != nil {
		c.log.Debug("statement of a CA node rejected", "error", err)
		return
	}
	c.judge.Heard(s, now.Add(-max(age, 0)))
	c.heardAt[s.Member] = now
}

// partners are the nodes to compare with, by id: those of the last table that two agreed
// on. When none of them was heard for long, those that the own node names count as well,
// until one is heard again: known is false, for these may be made up.
func (c *comparer) partners() (list map[string]*statev1.Member, known bool) {
	confirmed, source := c.Confirmed(), c.store.origin()
	list = map[string]*statev1.Member{}
	heard := c.began
	for _, m := range confirmed {
		if m.GetId() != source {
			list[m.GetId()] = m
			if at := c.heardAt[m.GetId()]; at.After(heard) {
				heard = at
			}
		}
	}
	known = len(list) == 0 || time.Since(heard) <= unheardAfter
	if len(list) == 0 || !known {
		for _, m := range c.View().Members {
			if m.GetId() != source && list[m.GetId()] == nil {
				list[m.GetId()] = m
			}
		}
	}
	return list, known
}

// content hashes the view. What has not changed is not hashed again.
func (c *comparer) content(v *View) compare.Content {
	h := &c.hashed
	if !sameSlice(h.members, v.Members) {
		h.members, h.content[compare.Members] = v.Members, compare.MembersHash(v.Members)
	}
	if jwks := v.Bundles[c.cfg.TrustDomain.Name()]; !sameSlice(h.jwks, jwks) {
		hash, err := c.bundleHash(jwks)
		if err != nil { // what cannot be read is not what the others hold
			c.log.Debug("this domain's bundle cannot be compared", "error", err)
			hash = compare.BundleHash([][]byte{jwks}, nil, nil)
		}
		h.jwks, h.content[compare.Bundle] = jwks, hash
	}
	if items, told := c.store.items(h.distrust); told != h.distrust {
		h.distrust, h.content[compare.Distrust] = told, h.items.Hash(items)
	}
	return h.content
}

func sameSlice[T any](a, b []T) bool {
	return a != nil && len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

func (c *comparer) bundleHash(jwks []byte) (compare.Hash, error) {
	own, _, err := bundle.Parse(c.cfg.TrustDomain, jwks)
	if err != nil {
		return compare.Hash{}, err
	}
	var roots [][]byte
	for _, cert := range own.X509 {
		roots = append(roots, cert.Raw)
	}
	jwt, err := publicKeys(own.JWT)
	if err != nil {
		return compare.Hash{}, err
	}
	wit, err := publicKeys(own.WIT)
	return compare.BundleHash(roots, jwt, wit), err
}

func publicKeys(keys []bundle.Key) (list [][]byte, err error) {
	for _, k := range keys {
		public, err := k.Public()
		if err != nil {
			return nil, err
		}
		der, err := x509.MarshalPKIXPublicKey(public)
		if err != nil {
			return nil, err
		}
		list = append(list, der)
	}
	return list, nil
}

// look compares, and asks who is not heard.
func (c *comparer) look(ctx context.Context, asks *sync.WaitGroup) {
	now := time.Now()
	view := c.View()
	source := c.store.origin()
	c.mu.Lock()
	follows, moving := c.node == source, c.moving
	maps.DeleteFunc(c.avoided, func(_ string, a Avoided) bool { return !now.Before(a.Until) })
	c.mu.Unlock()
	if view.Revision == 0 || moving {
		return
	}
	c.judge.Node(source)
	c.judge.View(view.Cluster.GetEpoch(), view.Revision, c.content(view))
	partners, known := c.partners()
	counts := func(id string) bool { return partners[id] != nil }
	c.judge.Forget(counts)
	d := c.judge.Decide(now, follows, counts)
	d.Confirmed = known && (d.Confirmed || len(partners) == 0)
	c.conclude(now, view, source, partners, d)
	if d.OnlyDistrust && d.Differing != c.only && d.Verdict == compare.Contradicted && c.details.Before(now) {
		c.nextAsk = now
	}
	if !c.asking && !now.Before(c.nextAsk) {
		c.ask(ctx, asks, now, partners, d)
	}
}

// name is a node's, for people.
func (c *comparer) name(id string) string {
	for _, m := range append(slices.Clone(c.Confirmed()), c.View().Members...) {
		if m.GetId() == id && m.GetName() != "" {
			return m.GetName()
		}
	}
	return fmt.Sprintf("%.12s", id)
}

func (c *comparer) names(ids []string) (names []string) {
	for _, id := range ids {
		names = append(names, c.name(id))
	}
	return names
}

// conclude acts on what comparing came to.
func (c *comparer) conclude(now time.Time, view *View, source string, partners map[string]*statev1.Member, d compare.Decision) {
	if d.Verdict == compare.Contradicted && !d.OnlyDistrust {
		c.leave(now, source, partners, d)
		return
	}
	var heard []string
	for id := range partners {
		if age, known := c.judge.Age(id, now); known && age <= compare.Fresh {
			heard = append(heard, c.name(id))
		}
	}
	slices.Sort(heard)
	name, by := c.name(source), c.names(d.By)
	c.mu.Lock()
	agrees := d.Verdict == compare.Agrees && slices.ContainsFunc(d.By, func(id string) bool { return c.avoided[id].ID == "" })
	if d.Confirmed {
		c.confirmed = view.Members
	}
	before := c.is.Doubt
	c.is.Node, c.is.Heard, c.is.Doubt, c.is.DoubtBy = name, heard, "", ""
	if d.Verdict == compare.Doubted {
		c.is.Doubt, c.is.DoubtBy = d.Why, by[0]
	} else if d.Verdict == compare.Agrees {
		c.gone = nil
	}
	c.mu.Unlock()
	if agrees {
		c.store.compared()
	}
	if d.Verdict == compare.Doubted && before == "" {
		c.log.Error("CA nodes contradict each other, and no third one is heard: what either denies is denied", "member", name, "contradicted_by", by, "reason", d.Why)
	}
}

// leave drops what a node said that two others contradict, and avoids it. It is unknown
// after a restart of a release that did not keep it.
func (c *comparer) leave(now time.Time, node string, partners map[string]*statev1.Member, d compare.Decision) {
	a := Avoided{ID: node, Name: c.name(node), Why: d.Why, By: c.names(d.By), Until: now.Add(avoidFor), Late: d.Late}
	if a.Late {
		c.mu.Lock()
		a.Until = now.Add(min(avoidLate<<min(c.late[node], 10), avoidFor))
		c.late[node]++
		c.mu.Unlock()
	}
	c.log.Error("two CA nodes agree with each other against this one: it is left and avoided; remove it if it lies", "member", a.Name, "member_id", node, "contradicted_by", a.By, "reason", a.Why, "avoided_until", a.Until.UTC().Format(time.RFC3339))
	c.mu.Lock()
	if node != "" {
		c.avoided[node] = a
	}
	c.moving, c.to = true, nil
	for _, id := range d.By {
		c.to = append(c.to, partners[id])
	}
	c.is.Moves++
	c.is.Doubt, c.is.DoubtBy = "", ""
	c.mu.Unlock()
	c.store.yield()
	c.acked.Store(0) // it is not what any other node means by that revision
	signal(c.move)
}

// ask has one node say what it holds, if too few are heard. Where distrust items alone
// differ, or one other node is heard only, it is asked for what it denies, too.
func (c *comparer) ask(ctx context.Context, asks *sync.WaitGroup, now time.Time, partners map[string]*statev1.Member, d compare.Decision) {
	c.nextAsk = now.Add(pause())
	var silent []string
	var young int
	var oldest time.Duration // of the young
	for _, id := range slices.Sorted(maps.Keys(partners)) {
		if age, known := c.judge.Age(id, now); known && age < youngEnough {
			young++
			oldest = max(oldest, age)
		} else {
			silent = append(silent, id)
		}
	}
	detail := d.Differing != "" && d.Differing != c.only
	var whom string
	switch {
	case detail:
		whom = d.By[0]
	case young >= min(2, len(partners)):
		c.nextAsk = now.Add(youngEnough - oldest + rand.N(lookEvery/2))
		return
	default: // in turn
		whom = silent[0]
		if i := slices.IndexFunc(silent, func(id string) bool { return id > c.last }); i >= 0 {
			whom = silent[i]
		}
		c.last = whom
		if young+1 < min(2, len(partners)) && c.second.Before(now) {
			c.nextAsk, c.second = now, now.Add(askEvery/2) // two are needed: the other at once
		} else if young > 0 {
			c.nextAsk = now.Add(min(c.nextAsk.Sub(now), max(youngEnough-oldest, askEvery/2)))
		}
	}
	m := partners[whom]
	c.asking = true
	if detail {
		c.details = now.Add(askEvery / 2)
	}
	asks.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, askWait)
		defer cancel()
		c.answers <- c.askNode(ctx, m, detail)
	})
}

// askNode asks one node over a connection of its own, which its key alone proves.
func (c *comparer) askNode(ctx context.Context, m *statev1.Member, detail bool) (a answer) {
	a.id = m.GetId()
	conn, err := c.dialAs(ctx, m.GetApiAddress(), detail, func(state tls.ConnectionState) error {
		if nodeID(state) != m.GetId() {
			return fmt.Errorf("it is not CA node %s", m.GetName())
		}
		return nil
	})
	if err != nil {
		a.err = err
		return a
	}
	defer conn.close()
	rpc := ententev1.NewCompareClient(conn.rpc)
	resp, err := rpc.Statement(ctx, &ententev1.StatementRequest{})
	if err != nil {
		a.err = plain(err)
		return a
	}
	s, err := compare.Verify(c.View().Cluster.GetId(), resp.GetStatement())
	if err == nil && s.Member != m.GetId() {
		err = errors.New("it answers with another node's statement")
	}
	if err != nil {
		a.err = err
		return a
	}
	a.statement, a.cluster = s, resp.GetCluster()
	if detail {
		if a.denials, err = rpc.Denials(ctx, &ententev1.DenialsRequest{}); err != nil {
			a.err = plain(err)
		}
	}
	return a
}

// answered takes what a node said itself.
func (c *comparer) answered(a answer) {
	if a.err != nil {
		c.log.Debug("CA node does not say what it holds", "node", c.name(a.id), "error", a.err)
	}
	source := c.store.origin()
	c.mu.Lock()
	follows, moving := c.node == source, c.moving
	c.mu.Unlock()
	if a.statement == nil {
		return
	}
	now := time.Now()
	c.offsets[a.id] = a.statement.Time.Sub(now)
	c.heardAt[a.id] = now
	c.judge.Heard(a.statement, now)
	if moving {
		return
	}
	partners, _ := c.partners()
	if view := c.View(); a.cluster.GetEpoch() > view.Cluster.GetEpoch() && c.store.follows(a.cluster) {
		// The recovery key has ended the epoch of the own node: its word is enough.
		c.leave(now, source, partners, compare.Decision{By: []string{a.id}, Late: true, Why: fmt.Sprintf("a recovery ended its epoch %d", view.Cluster.GetEpoch())})
		return
	}
	d := c.judge.Decide(now, follows, func(id string) bool { return partners[id] != nil })
	switch {
	case d.Verdict == compare.Contradicted && d.OnlyDistrust && slices.Contains(d.By, a.id):
		// Items that the own node alone has are its denials, which count: it may stay.
		if a.denials != nil && c.store.holds(a.denials.GetDistrust()) {
			c.only = d.Differing
		} else if a.denials != nil || a.err != nil {
			c.leave(now, source, partners, d)
		}
	case d.Verdict == compare.Doubted && a.denials != nil && d.By[0] == a.id:
		c.deny(a.denials)
		c.only = d.Differing
	}
}

// deny has what the only other node in reach denies denied here: its distrust items, the
// authorities that it does not hold, and the CA nodes that it does not know.
func (c *comparer) deny(theirs *ententev1.DenialsResponse) {
	view := c.View()
	items := theirs.GetDistrust()
	if ours, err := bundleKeys(c.cfg.TrustDomain, view.Bundles[c.cfg.TrustDomain.Name()]); err == nil {
		if keys, err := bundleKeys(c.cfg.TrustDomain, theirs.GetJwks()); err == nil {
			for id := range ours {
				if !keys[id] {
					items = append(items, authorityItem(id))
				}
			}
		}
	}
	c.store.deny(items)
	gone := map[string]bool{}
	for _, m := range view.Members {
		gone[m.GetId()] = !slices.ContainsFunc(theirs.GetMembers(), func(o *statev1.Member) bool { return o.GetId() == m.GetId() })
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	gone[c.node] = false // it stays
	maps.DeleteFunc(gone, func(_ string, yes bool) bool { return !yes })
	c.gone = gone
}
