package feed

import (
	"cmp"
	"slices"
)

// Contradicted is a CA node that subscribers avoid, since two others contradicted it.
type Contradicted struct {
	Node        string
	Subscribers []string // sorted, at most 10
	Count       int
}

// Contradicts takes the subscriber's word on the CA nodes that it avoids.
func (s *Session) Contradicts(nodes []string) (news bool) {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	if slices.Equal(s.contradicted, nodes) {
		return false
	}
	s.contradicted = nodes
	return len(nodes) > 0
}

// Contradicted lists what the subscribers with a stream say, by node; at most 64 nodes.
func (f *Feed) Contradicted() []Contradicted {
	f.mu.Lock()
	defer f.mu.Unlock()
	by := map[string][]string{}
	for _, s := range f.sessions {
		if !s.live {
			continue
		}
		for _, node := range s.contradicted {
			by[node] = append(by[node], s.who.String())
		}
	}
	var list []Contradicted
	for node, names := range by {
		slices.Sort(names)
		list = append(list, Contradicted{node, names[:min(len(names), 10)], len(names)})
	}
	slices.SortFunc(list, func(a, b Contradicted) int { return cmp.Or(b.Count-a.Count, cmp.Compare(a.Node, b.Node)) })
	const most = 64
	return list[:min(len(list), most)]
}
