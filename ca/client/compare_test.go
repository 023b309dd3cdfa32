package client

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/compare"
)

// stating is a CA node that makes statements.
type stating struct {
	*statev1.Member
	key *ecdsa.PrivateKey
	pub []byte
}

func newStating(t testing.TB) stating {
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return stating{&statev1.Member{Id: ca.KeyID(pub), Name: "ca"}, key, pub}
}

func (n stating) state(t testing.TB, cluster []byte, epoch uint32, revision uint64, c compare.Content) *ententev1.SignedStatement {
	s := &compare.Statement{Member: n.GetId(), Epoch: epoch, Time: time.Now()}
	s.History.Add(revision, c)
	signed, err := s.Sign(cluster, func(sum [sha256.Size]byte) (key, signature []byte, err error) {
		der, err := ecdsa.SignASN1(cryptorand.Reader, n.key, sum[:])
		if err != nil {
			return nil, nil, err
		}
		signature, err = ca.FixedSignature(der)
		return n.pub, signature, err
	})
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// A statement of another epoch that the own node passes on does not count as heard: the
// node that made it is asked itself, since it alone shows what began that epoch.
func TestAnotherEpochIsAskedFor(t *testing.T) {
	n := newStating(t)
	c, err := New(Config{TrustDomain: bank, Addresses: []string{"a:1"}, Members: []*statev1.Member{n.Member}})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.store.policy(full(5, "a")); err != nil {
		t.Fatal(err)
	}
	cluster := c.View().Cluster
	for _, later := range []uint32{1, 0} { // 0 is the control
		partners, _ := c.compare.partners()
		c.compare.hear(n.state(t, cluster.GetId(), cluster.GetEpoch()+later, 5, compare.Content{}), partners)
		if _, heard := c.compare.judge.Age(n.GetId(), time.Now()); heard != (later == 0) {
			t.Errorf("%d epochs later: heard %v", later, heard)
		}
	}
}

// What a subscriber's comparing costs for a minute: a look each second, and what two other
// nodes state with every second heartbeat, every 4 s at the most often; while nothing
// changes, and while one of 1,000 distrust items changes every second.
func BenchmarkComparingForAMinute(b *testing.B) {
	for _, items := range []int{0, 1000} {
		b.Run(fmt.Sprintf("changing=%d", items), func(b *testing.B) {
			nodes := []stating{newStating(b), newStating(b)}
			own := newStating(b)
			c, err := New(Config{TrustDomain: bank, Addresses: []string{"a:1"}, Members: []*statev1.Member{own.Member, nodes[0].Member, nodes[1].Member}})
			if err != nil {
				b.Fatal(err)
			}
			p := full(5, `{"keys": []}`)
			for i := range items {
				p.Distrust = append(p.Distrust, distrustOf(fmt.Sprintf("h%d", i))...)
			}
			c.store.attach(own.GetId())
			if err := c.store.policy(p); err != nil {
				b.Fatal(err)
			}
			c.compare.node, c.compare.began = own.GetId(), time.Now()
			c.compare.nextAsk = time.Now().Add(time.Hour)
			content := c.compare.content(c.View())
			var statements []*ententev1.SignedStatement
			for _, n := range nodes {
				statements = append(statements, n.state(b, c.View().Cluster.GetId(), c.View().Cluster.GetEpoch(), 5, content))
			}
			partners, _ := c.compare.partners()
			for b.Loop() {
				for second := range 60 {
					if items > 0 {
						c.store.mu.Lock()
						item := fmt.Sprintf("h%d", second)
						for id, d := range c.store.state.Distrust {
							if d.GetAgent() == item {
								c.store.state.Distrust[id] = proto.CloneOf(d)
								break
							}
						}
						c.store.counted++
						c.store.mu.Unlock()
					}
					if second%4 == 0 {
						for i, s := range statements {
							c.compare.judge = compare.Judge{} // so that each is verified
							c.compare.hear(s, partners)
							if _, heard := c.compare.judge.Age(nodes[i].GetId(), time.Now()); !heard {
								b.Fatal("not heard")
							}
						}
					}
					c.compare.look(b.Context(), nil)
				}
			}
			b.ReportMetric(100*b.Elapsed().Seconds()/float64(b.N)/60, "%core")
		})
	}
}
