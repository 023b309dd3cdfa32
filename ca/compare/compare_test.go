package compare

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func content(members, bundle, distrust byte) Content {
	return Content{{members}, {bundle}, {distrust}}
}

// world is a subscriber of node a, with other nodes, and one second after the other.
type world struct {
	judge   Judge
	now     time.Time
	nodes   map[string]*History
	behind  map[string]bool
	epochs  map[string]uint32
	hears   func(id string) bool
	decided Decision
}

func newWorld(others ...string) *world {
	w := &world{now: start, nodes: map[string]*History{}, behind: map[string]bool{}, epochs: map[string]uint32{}, hears: func(string) bool { return true }}
	for _, id := range others {
		w.nodes[id] = &History{}
	}
	w.judge.Node("a")
	return w
}

// second has the nodes hold contents and the subscriber a view, for a second.
func (w *world) second(view uint64, c Content, others map[string]struct {
	revision uint64
	content  Content
}) Decision {
	w.now = w.now.Add(time.Second)
	for id, o := range others {
		w.nodes[id].Add(o.revision, o.content)
		var copied History
		for p := range copied {
			copied[p] = slices.Clone(w.nodes[id][p])
		}
		if w.hears(id) {
			w.judge.Heard(&Statement{Member: id, Epoch: w.epochs[id], Time: w.now, Behind: w.behind[id], History: copied}, w.now)
		}
	}
	w.judge.View(0, view, c)
	w.decided = w.judge.Decide(w.now, true, func(id string) bool { return w.nodes[id] != nil })
	return w.decided
}

type held = map[string]struct {
	revision uint64
	content  Content
}

func at(revision uint64, c Content) struct {
	revision uint64
	content  Content
} {
	return struct {
		revision uint64
		content  Content
	}{revision, c}
}

// Two nodes that agree with each other are believed against the own one after 15 s, and
// not before; one alone never is.
func TestTwoNodesContradict(t *testing.T) {
	good := content(1, 1, 1)
	for name, c := range map[string]struct {
		view     uint64
		content  Content
		others   held
		verdict  Verdict
		distrust bool
	}{
		"control: all the same":             {100, good, held{"b": at(100, good), "c": at(100, good)}, Agrees, false},
		"a root of its own":                 {100, content(1, 2, 1), held{"b": at(100, good), "c": at(100, good)}, Contradicted, false},
		"members of its own":                {100, content(2, 1, 1), held{"b": at(100, good), "c": at(100, good)}, Contradicted, false},
		"distrust items differ":             {100, content(1, 1, 2), held{"b": at(100, good), "c": at(100, good)}, Contradicted, true},
		"a revision of its own":             {1 << 43, good, held{"b": at(100, good), "c": at(100, good)}, Contradicted, false},
		"stands still":                      {100, good, held{"b": at(200, good), "c": at(200, good)}, Contradicted, false},
		"the others do not agree":           {100, good, held{"b": at(100, content(2, 1, 1)), "c": at(100, content(3, 1, 1))}, Unknown, false},
		"a liar among the others":           {100, good, held{"b": at(100, content(2, 2, 2)), "c": at(100, good)}, Agrees, false},
		"a liar far ahead among the others": {100, good, held{"b": at(1<<43, good), "c": at(100, good)}, Agrees, false},
		"the only other one contradicts":    {100, content(1, 2, 1), held{"b": at(100, good)}, Doubted, false},
		"the only other one agrees":         {100, good, held{"b": at(100, good)}, Agrees, false},
		"three others, one of them with us": {100, content(1, 2, 1), held{"b": at(100, good), "c": at(100, good), "d": at(100, content(1, 2, 1))}, Contradicted, false},
		"nobody else is heard":              {100, content(1, 2, 1), held{}, Unknown, false},
	} {
		w := newWorld("b", "c", "d")
		for i := 1; i <= 17; i++ {
			d := w.second(c.view, c.content, c.others)
			if i < int(Patience/time.Second) && (d.Verdict == Contradicted || d.Verdict == Doubted) {
				t.Errorf("%s: decided after %d s: %+v", name, i, d)
			}
		}
		if d := w.decided; d.Late != (name == "stands still") {
			t.Errorf("%s: late %v", name, d.Late)
		}
		if d := w.decided; d.Verdict != c.verdict || d.OnlyDistrust != c.distrust || (d.Verdict == Contradicted) != (len(d.By) == 2 && d.Why != "") {
			t.Errorf("%s: %+v", name, d)
		}
	}
}

// Who says that it lacks what was agreed, speaks of another epoch, or is not heard any
// more, contradicts nobody.
func TestOnlyCurrentStatementsCount(t *testing.T) {
	good := content(1, 1, 1)
	lag := held{"b": at(50, good), "c": at(50, good)}
	for name, c := range map[string]struct {
		set     func(*world)
		verdict Verdict
	}{
		"control":          {func(*world) {}, Contradicted},
		"behind":           {func(w *world) { w.behind["b"] = true }, Unknown},
		"of another epoch": {func(w *world) { w.epochs["b"] = 1; w.epochs["c"] = 1 }, Unknown},
		"silent after 5 s": {func(w *world) {
			w.hears = func(string) bool { return w.now.Before(start.Add(5 * time.Second)) }
		}, Unknown},
	} {
		w := newWorld("b", "c")
		c.set(w)
		for range 30 {
			w.second(100, good, lag)
		}
		if w.decided.Verdict != c.verdict {
			t.Errorf("%s: %+v", name, w.decided)
		}
	}
	// A replayed statement is none; what is not counted is not heard.
	w := newWorld("b", "c")
	old := &Statement{Member: "b", Time: start, History: History{{{1, 1, Hash{9}}}, {{1, 1, Hash{9}}}, {{1, 1, Hash{9}}}}}
	w.second(100, good, held{"b": at(100, good), "c": at(100, good)})
	w.judge.Heard(old, w.now)
	if age, known := w.judge.Age("b", w.now); !known || age != 0 {
		t.Errorf("age %v", age)
	}
	if d := w.second(100, good, held{}); d.Verdict != Agrees || len(d.By) != 2 {
		t.Errorf("a replayed statement counts: %+v", d)
	}
}

// A node that lies half of the time is left as well; a moment of difference is forgotten.
func TestLiesInTurns(t *testing.T) {
	good, lie := content(1, 1, 1), content(1, 2, 1)
	others := held{"b": at(100, good), "c": at(100, good)}
	left := func(period, lying int) int {
		w := newWorld("b", "c")
		for i := range 300 {
			c := good
			if i%period < lying {
				c = lie
			}
			if w.second(100, c, others).Verdict == Contradicted {
				return i
			}
		}
		return -1
	}
	if at := left(20, 10); at < 0 || at > 100 {
		t.Errorf("a node that lies half of the time is left after %d s", at)
	}
	if at := left(20, 2); at >= 0 {
		t.Errorf("a moment of difference ends a session after %d s", at)
	}
}

// Honest nodes that are slow, restart, or change quickly contradict nobody: 2,000 changes
// a second, of which some are of members, authorities and distrust items; subscribers hear
// them late.
func TestHonestNodesDoNotContradict(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		type change struct {
			revision uint64
			content  Content
		}
		log := []change{{1, content(1, 1, 1)}}
		w := newWorld("b", "c")
		seen := map[string]int{}
		advance := func(who string, most int) change { // up to most seconds late
			seen[who] = max(seen[who], len(log)-1-r.IntN(most+1))
			return log[max(seen[who], 0)]
		}
		view := log[0]
		for second := range 120 {
			last := log[len(log)-1]
			next := change{last.revision + 2000, last.content}
			for p := range next.content {
				if r.IntN(3+10*p) == 0 {
					next.content[p] = Hash{byte(r.IntN(250)), byte(second)}
				}
			}
			log = append(log, next)
			others := held{}
			for _, id := range []string{"b", "c"} {
				if r.IntN(20) == 0 {
					w.nodes[id] = &History{} // restarted
				}
				c := advance(id, 4)
				others[id] = at(c.revision, c.content)
			}
			if c := advance("a", 5); c.revision > view.revision {
				view = c
			}
			if d := w.second(view.revision, view.content, others); d.Verdict == Contradicted || d.Verdict == Doubted {
				t.Fatalf("seed %d, second %d: %+v", seed, second, d)
			}
		}
	}
}

// What counted against one node does not count against the next.
func TestNextNodeBeginsAnew(t *testing.T) {
	good := content(1, 1, 1)
	others := held{"b": at(100, good), "c": at(100, good), "d": at(100, good)}
	w := newWorld("b", "c", "d")
	for range 20 {
		w.second(1<<43, content(2, 2, 2), others)
	}
	if w.decided.Verdict != Contradicted {
		t.Fatalf("control: %+v", w.decided)
	}
	w.judge.Node("b")
	if d := w.second(100, good, others); d.Verdict != Agrees || len(d.By) != 2 || !d.Confirmed {
		t.Errorf("at the next node: %+v", d)
	}
}

func TestHistory(t *testing.T) {
	var h History
	for r := uint64(1); r <= 30; r++ {
		h.Add(r*10, content(1, byte(r/3), byte(r)))
	}
	if len(h[Members]) != 1 || h[Members][0] != (Span{10, 300, Hash{1}}) {
		t.Errorf("members %v", h[Members])
	}
	if n := len(h[Distrust]); n != maxSpans || h[Distrust][n-1] != (Span{300, 300, Hash{30}}) {
		t.Errorf("distrust %v", h[Distrust])
	}
	if h.Revision() != 300 {
		t.Errorf("at %d", h.Revision())
	}
	h.Add(300, content(1, 10, 31)) // the same revision with another content: it was not over
	if last := h[Distrust][maxSpans-1]; last != (Span{300, 300, Hash{31}}) {
		t.Errorf("last %v", last)
	}
	h.Add(5, content(7, 7, 7))
	if len(h[Members]) != 1 || h.Revision() != 5 {
		t.Errorf("back: %v", h)
	}
}

func TestHashesSeeEachRecord(t *testing.T) {
	a, b := &statev1.Member{Id: "a", Name: "x"}, &statev1.Member{Id: "b", Voter: true}
	if MembersHash([]*statev1.Member{a, b}) != MembersHash([]*statev1.Member{b, a}) {
		t.Error("the order counts")
	}
	changed := proto.CloneOf(b)
	changed.ApiAddress = "evil:1"
	seen := map[Hash]string{}
	for name, h := range map[string]Hash{
		"both": MembersHash([]*statev1.Member{a, b}), "one": MembersHash([]*statev1.Member{a}), "none": MembersHash(nil), "changed": MembersHash([]*statev1.Member{a, changed}),
		"root": BundleHash([][]byte{{1}}, nil, nil), "as a token key": BundleHash(nil, [][]byte{{1}}, nil), "as a WIT key": BundleHash(nil, nil, [][]byte{{1}}), "two": BundleHash([][]byte{{1}, {2}}, nil, nil),
	} {
		if other, taken := seen[h]; taken {
			t.Errorf("%s and %s have one hash", name, other)
		}
		seen[h] = name
	}
}

type nodeKey struct {
	key  *ecdsa.PrivateKey
	spki []byte
}

func newKey(t testing.TB) nodeKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return nodeKey{key, spki}
}

func (k nodeKey) sign(sum [sha256.Size]byte) (key, signature []byte, err error) {
	der, err := ecdsa.SignASN1(cryptorand.Reader, k.key, sum[:])
	if err != nil {
		return nil, nil, err
	}
	signature, err = ca.FixedSignature(der)
	return k.spki, signature, err
}

// A statement counts if the node that it names signed all of it, for this cluster.
func TestStatementIsSigned(t *testing.T) {
	k, other := newKey(t), newKey(t)
	cluster := []byte("0123456789abcdef")
	var h History
	h.Add(7, content(1, 2, 3))
	h.Add(9, content(1, 2, 4))
	s := &Statement{Member: ca.KeyID(k.spki), Epoch: 2, Time: start, Behind: true, History: h}
	good, err := s.Sign(cluster, k.sign)
	if err != nil {
		t.Fatal(err)
	}
	back, err := Verify(cluster, good)
	if err != nil || back.Member != s.Member || back.Epoch != 2 || !back.Time.Equal(start) || !back.Behind || fmt.Sprint(back.History) != fmt.Sprint(h) {
		t.Fatalf("%+v, %v", back, err)
	}
	foreign, _ := s.Sign(cluster, other.sign)
	if _, err := Verify([]byte("another cluster."), good); err == nil {
		t.Error("another cluster's")
	}
	for name, bad := range map[string]func(*ententev1.SignedStatement){
		"another node's signature": func(m *ententev1.SignedStatement) { proto.Reset(m); proto.Merge(m, foreign) },
		"another node's key":       func(m *ententev1.SignedStatement) { m.NodeKey = other.spki },
		"altered":                  func(m *ententev1.SignedStatement) { m.Statement[len(m.Statement)-1] ^= 1 },
		"altered signature":        func(m *ententev1.SignedStatement) { m.Signature[5] ^= 1 },
		"no signature":             func(m *ententev1.SignedStatement) { m.Signature = nil },
		"nothing":                  func(m *ententev1.SignedStatement) { m.Statement = nil },
		"a long key":               func(m *ententev1.SignedStatement) { m.NodeKey = make([]byte, maxSigned) },
		"a long signature":         func(m *ententev1.SignedStatement) { m.Signature = make([]byte, maxSigned) },
		"more than is known": func(m *ententev1.SignedStatement) {
			m.ProtoReflect().SetUnknown(append([]byte{0xfa, 0x7f, 0x80, 0x40}, make([]byte, 1<<13)...))
		},
		"too long": func(m *ententev1.SignedStatement) { m.Statement = make([]byte, maxStatement+1) },
	} {
		m := proto.CloneOf(good)
		bad(m)
		if _, err := Verify(cluster, m); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	// What is passed on before anybody has verified it is small.
	for _, n := range []int{0, maxSigned} { // 0 is the control
		m := proto.CloneOf(good)
		m.Signature = append(m.Signature, make([]byte, n)...)
		if _, err := Read(m); (err != nil) != (n > 0) {
			t.Errorf("%d bytes too many: %v", n, err)
		}
	}
}

// Nothing that a node sends stops a subscriber, and what is read is in order.
func FuzzReadStatement(f *testing.F) {
	var h History
	h.Add(7, content(1, 2, 3))
	s, _ := (&Statement{Member: "m", Time: start, History: h}).Sign([]byte("c"), func([sha256.Size]byte) (a, b []byte, err error) { return nil, nil, nil })
	f.Add(s.GetStatement())
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Read(&ententev1.SignedStatement{Statement: b})
		if err != nil {
			return
		}
		for _, spans := range s.History {
			for i, span := range spans {
				if len(spans) > maxSpans || span.To < span.From || i > 0 && span.From <= spans[i-1].To {
					t.Errorf("spans %v", spans)
				}
			}
		}
		var j Judge
		j.Node("a")
		j.View(s.Epoch, 5, content(1, 1, 1))
		j.Heard(s, start)
		j.Decide(start, true, func(string) bool { return true })
	})
}

// A set that changes has the hash that it would have anew, which is the one that other
// nodes of any release make of these items.
func TestDistrustSetHashesAsAnew(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var set DistrustSet
	var items []*statev1.Distrust
	seen := map[Hash]bool{}
	for step := range 500 {
		switch i := r.IntN(len(items) + 1); {
		case i == len(items):
			items = append(items, &statev1.Distrust{Agent: fmt.Sprint("h", step)})
		case step%3 == 0:
			items = slices.Delete(slices.Clone(items), i, i+1)
		default: // as many as before, in another order
			items = slices.Clone(items)
			items[i] = &statev1.Distrust{Agent: fmt.Sprint("h", step)}
			r.Shuffle(len(items), func(i, j int) { items[i], items[j] = items[j], items[i] })
		}
		var records [][]byte
		for _, i := range items {
			sum := ca.RecordHash(i)
			records = append(records, sum[:])
		}
		want := hashSet(records)
		first, again := set.Hash(items), set.Hash(items)
		if first != want || again != want || DistrustHash(items) != want {
			t.Fatalf("step %d: another hash of %d items", step, len(items))
		}
		seen[want] = true
	}
	if len(seen) < 100 {
		t.Errorf("control: %d sets", len(seen))
	}
}
