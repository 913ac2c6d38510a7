"""Common English words: what tells a text from letters in a row."""

import re

# Words that hold a sentence together. A text of any length has some.
FUNCTION = frozenset(
    "a about above across after against all along although always am among an and another any are"
    " around as at away back be because been before behind being below beneath beside between"
    " beyond both but by can cannot could did do does doing done down during each either else"
    " enough even ever every everyone everything few for from had has have having he her here hers"
    " herself him himself his how however i if in inside into is it its itself just least less"
    " like many may me might mine more most much must my myself near neither never no nobody none"
    " nor not nothing now of off often on once one only onto or other others our ours out outside"
    " over own perhaps quite rather same shall she should since so some someone something still"
    " such than that the their theirs them themselves then there these they this those though"
    " through till to together too toward towards under underneath until up upon us very was we"
    " were what whatever when where whether which while who whom whose why will with within"
    " without would yet you your yours yourself".split()
)
# Content words in their plain form. Two in three words of a story are here or in FUNCTION, at
# least; a longer list lets more rare words through.
COMMON = frozenset(
    """
    abandon ability able abroad absence absolute absorb abundant academic accept access accident
    accompany accord account accra accurate ache achieve acorn acquire act action active actor
    adapt add address adjust admire admit adopt adult advance advantage adventure advice afford
    afraid afternoon afterwards again age agency agent agree agreement ahead aid aim air aircraft
    airport airy alarm alert alike alive allow allowed almost alone aloud alphabet already alter
    alternative altogether amaze amber ambition amount ample amuse ana analysis ancient angel anger
    angle angry animal ankle announce annual answer ant anxious anybody anyone anything anyway
    anywhere apart apology apparent appeal appear appetite apple appoint appreciate approach
    appropriate approve april apron arch arctic area argue argument arise arm army aroma arrange
    arrival arrive arrow art article artisan artist ash aside ask asleep aspect assist assume
    assure atmosphere attach attack attempt attend attention attic attitude attract audience august
    aunt author authority automatic autumn available avenue average avoid await awake award aware
    awe awful awkward axe baby backpack backward backyard bacon badge badly bag baggage bake baker
    balance balcony ball balloon bamboo banana band bank banner bar bare barefoot barely bargain
    bark barley barn barrel base basic basically basin basket basketball batch bath bathe bathroom
    battery battle bay beach bead beam bean bear beard beast beat beautiful beauty beaver become
    bed bedroom bedtime bee beech beetle beg begin behave behavior behaviour belief believe bell
    belong beloved ben bench bend benefit bergen berry best better bicycle big bike bill bind
    binding birch bird birth birthday biscuit bit bite bitter black blackberry blade blame blanket
    blaze bleak blend bless blessing blind blink bliss block blood bloom blossom blow blue
    blueberry bluebird blueprint blurry blush board boast boat body boil bold bolt bone bonfire
    book bookshelf bookshop boot border bore bored born borrow boss bottle bottom bough boundary
    bouquet bow bowl box boy bracelet brain branch brandy brass brave bravely bread break breakfast
    breath breathe breeze brew brick bridge brief bright brightly brightness brilliant brim bring
    brisk broad broken brook broom brother brown brush bubble bucket bud budget build building bulb
    bump bunch bundle burden burn burst bush business bustle busy butter butterfly button buy buzz
    cabbage cabin cabinet cafe cage cairo cake calendar calf call calm calmly camel camera camp
    campus canal candle candy canoe canvas canyon cap capable cape capital captain capture car card
    care careful carefully caress carnival carpenter carpet carriage carrot carry cart carve
    cascade case cast castle casual cat catch caterpillar cathedral cattle cause caution cautious
    cave cedar ceiling celebrate cellar cent center centre century ceramic cereal certain chain
    chair chalk challenge chamber champion chance change channel chant chapter character charcoal
    charge charm chase cheap check cheek cheer cheerful cheerfully cheese chef cherish cherry chest
    chestnut chicken child childhood chill chimney chin chip chirp chloe chocolate choice choir
    choose chop chord chorus chosen chuckle church cider cinema cinnamon circle citizen city civil
    claim clap clarity clasp class classic classroom clatter clay clean clear clearly clever click
    cliff climate climb cling clink cloak clock close closely closet cloth clothes cloud cloudy
    clover club clue cluster clutter coach coal coast coastal coat cobble cocoa coffee coin cold
    collar collect collection college color colour column comb come comet comfort comfortable
    comment common communicate community companion company compare compass compete complain
    complete complex compose compute computer concentrate concept concern concert conclude
    condition confess confidence confident confuse connect connection conscious consider constant
    contain content contest continue contrast contribute control conversation convince cook cookie
    cool copper copy coral cord core corn corner correct cosmic cost cosy cottage cotton couch
    cough council count counter country couple courage course court courtyard cousin cover cow cozy
    crack cracked crackle cradle craft crane cranky crash crave crawl crayon creak creaky cream
    creamy create creature credit creek creep crew cricket crimson crisp critical crochet crooked
    cross crossing crowd crown cruel crumb crumble crunch crunchy crush cry crystal cuddle
    cultivate culture cup cupboard cure curiosity curious curl current currently curse curtain
    curve cushion custard custom customer cut cycle daily dainty dairy daisy damp dance dancer
    danger dangle dare daring dark darkness darling dash date daughter dawn day daylight dazzle
    dazzling dead deal dear death debate debt decade december decide deck decorate deed deep deeply
    deer defend definite definitely degree delay delicate delicious delight delightful deliver
    demand den deny depart department depend depth descend desert deserve design desire desk
    dessert destiny destroy detail determine develop device devote dew dialogue diamond diary dice
    dictionary die differ different difficult dig diligent dim dine dinner direct direction dirt
    dirty disappear disappoint disaster disc discover discuss discussion dish display distance
    distant distinct district disturb ditch dive divide dmitri dock doctor document dog doll
    dolphin dome domestic donkey door doorstep doorway dot double doubt dough dove downstairs
    downtown dozen draft drag dragon drama drape draw drawer drawing dreadful dream dreamer dreamy
    dress dried drift drink drip drive drizzle drop droplet drown drowsy drum drummer drumming dry
    dublin duck due dull dusk dust dusty duty dwarf dwell eager eagerly eagle ear early earn earth
    earthy ease easel easily east easy eat echo echoing economy edge edition educate education
    effect effective efficient effort effortless egg eight elbow elder elderly electric elegant
    element elephant eleven elif elsewhere ember embrace emerald emerge emotion empire employ empty
    enchant encourage end endless endure enemy energy engine enjoy enormous ensure enter entertain
    enthusiasm entire entirely entrance envelope environment envy equal equipment era error
    eruption escape especially essen essence essential establish eternal evening event eventually
    evergreen everybody everyday everywhere evident evil evolve exact examine example excellent
    except exchange excite excitement exclaim excuse exercise exist exotic expand expect expensive
    experience experiment expert explain explode explore express extend extra extraordinary extreme
    eye eyebrow fable fabric face facing fact factory fade fail failure faint fair fairy faith
    faithful fall false fame familiar family famous fan fancy far farewell farid farm farmer
    farmhouse farther fascinate fashion fast fat fate father fault favor favorite favour favourable
    favourite fear feast feather feature february feed feel feeling feet fellow fence fern festival
    fetch fever fiction fiddle field fierce fifteen fifth fifty fig fight figure file fill film
    final finally find fine finely finger finish finished fire firefly firelight fireplace firewood
    firm firmly first fish fisherman five fix flag flake flame flannel flap flash flat flavor
    flavour flavourful fleet fleeting flesh flexible flicker flight flip float flock flood floor
    floral florence flour flourish flow flower fluent fluffy flute flutter fly foam focus fog fold
    folded folk folklore follow fond food fool foolish foot footprint footstep force foreign forest
    forever forget forgive fork form formal former forth fortunate fortune forty forward found
    foundation fountain four fox fragile fragment fragrance fragrant frame free freedom freely
    freeze fresh freshly friday friend friendly friendship frighten frog front frontier frost
    frosty frozen fruit fry fuel fulfil full fun fundamental funeral funny fur furniture further
    future fuzzy gadget gain gale gallery gallop game gap garage garden garland garlic garment gasp
    gate gather gaze gem general generation generous geneva genius gentle gentleman gently genuine
    gesture ghost ghostly giant gift giggle ginger girl give given glad glamour glance glare glass
    glaze gleam gleaming glide glimmer glimpse glint glisten glitter globe gloom glorious glory
    gloss glove glow glue go goal goat gold golden good goodbye goodness goose gossip govern gown
    grace graceful grade graduate grain grammar grand grandfather grandma grandmother grandpa
    granite grape grasp grass grateful gratitude grave gravel gravity gray great greatly green
    greenhouse greet greeting grey grief grill grin grip grocery groove ground group grove grow
    growth guard guardian guess guest guide guilt guilty guitar guitarist gull gust gypsy habit
    hair half hall hallway halt hammer hand handful handle handmade handsome hang hanoi happen
    happily happiness happy harbor harbour hard hardly hardwood harm harmony harp harsh harvest
    haste hat hatch hate haul haunt hawk hay haze hazy head headache headline heal healing health
    healthy heap hear heart hearth hearty heat heather heaven heavenly heavy hedge heel height
    hello helmet help helpful helpless hen herb herd heritage hero hesitate hidden hide high
    highway hill hilltop hint hip hire hiro history hit hobby hold hole holiday hollow holy home
    homeland homemade homeward honest honestly honey honeysuckle honor honour hood hoof hook hop
    hope hopeful hopefully horizon horn horse hospital host hot hotel hour house household hover
    hug huge hum human humble humid humor humour hundred hunger hungry hunt hurry hurt husband hush
    hut hymn ice iceberg icicle icy idea ideal identity idle ignite ignore ill illuminate image
    imagination imagine imperfect important impossible impress improve impulse incense inch include
    increase incredible indeed independent indicate individual indoors industry ines infant
    influence inform information initial injury ink inn inner innocent inquire insect insist
    inspire instant instantly instead instinct instrument intend intense interest interior invent
    invisible invitation invite iron island issue item ivory ivy izmir jacket jakarta jam january
    jar jasmine jaw jay jazz jelly jewel jingle job jockey join joke jolly jonas journal journey
    joy joyful joyfully joyous judge jug juggle juice juicy july jump june jungle junior justice
    keen keep keiko kept kettle key keyboard kick kid kind kindly kindness king kingdom kiss kit
    kitchen kite kitten knee kneel knife knight knit knitting knob knock knot know knowledge known
    kyoto label labor laboratory labour lace lack lad ladder lady ladybug lake lakeside lamb lamp
    lamplight land landing landmark landscape lane language lantern lap laptop large lark last
    lasting latch late lately later lather laugh laughter laundry lavender law lawn lay layer lazy
    lead leader leaf leafless leafy lean leap learn leather leave left leg legend leisure lemon
    lemonade lend length lesson let letter level liam liberty library lick lid lie life lifetime
    lift light lighthouse lightly lightning likely lilac lily lima limb limestone limit line linen
    linger lingering lion lip liquid list listen literature little live lively living lizard load
    loaf lobby local location lock lodge lofty log logic lonely long longing look loom loop loose
    lord lose loss lost lot loud love lovely lover lovingly low lower loyal loyalty luck lucky
    luggage lullaby luminous lunar lunch lung lush luxury machine mad made magazine magic magical
    magnet magnificent maid mail main majestic make maker malmo man manage manner mansion mantel
    manual manuscript map maple mara marble march marigold mark market marmalade marry marsh marvel
    mask massive master mat match mate material matter mattress mature maybe meadow meal mean
    meaning meaningful meanwhile measure meat medal medicine medium meet melancholy mellow melody
    melt member memorable memory men mend mental mention merchant mercy merge merrily merry mess
    message metal meteor method microphone midday middle midnight mighty mild mile military milk
    mill mind mineral miniature minor minute miracle mirror mischief miss mission mist mistake
    misty mix mixture moan model modern modest modestly moist mold moment monday money monkey month
    mood moon moonlight moonlit morning mosaic moss mother motion motor motto mount mountain mouse
    mouth move mud mug murmur muscle mushroom music musical musician mutter mysterious mystery myth
    nail nairobi name nap narrow nation native natural nature naughty navy nearby nearly neat
    neatly necessary neck necklace need needle neighbor neighbour nephew nerve nervous nest net
    neutral new news next nibble nice niece night nightfall nightingale nils nine noble nod noise
    noisy nonsense noon normal north nose nostalgia notch note notebook notice nourish novel
    november nowadays nowhere number nurse nursery nut oak oar oasis oatmeal object observe obtain
    obvious obviously occasion occasionally occur ocean october odd offer offering office officer
    official oil ointment old olga olive onion open opera operate opinion opportunity opposite
    option orange orchard orchestra order ordinary organ organise organize original ornament oslo
    ought ounce outcome outdoors outline outlook oven overcome overflow overhead overlook owl owner
    oxygen pablo pace pack package packet paddle page paid pail pain paint painted painter painting
    pair pajamas palace pale palm pan pancake pane panel panic pansy papa paper parachute parade
    paradise parasol parcel parent park parlor parlour parrot part particular particularly partner
    party pass passage passenger passion past pasta paste pastry patch patchwork path pathway
    patience patient patiently pattern pause pavement paw pay peace peaceful peach peak peanut pear
    pearl peasant pebble pedal peek peel pen pencil penguin penny people pepper perch perfect
    perfectly perform performance perfume period permanent permit person personal perspective pet
    petal phase philosophy phoenix phone photo photograph phrase physical pianist piano pick picnic
    picture pie piece pig pigeon pile pillar pillow pilot pin pinch pine pink pioneer pipe pirate
    pitch place plain plan plane planet plant plaster plastic plate platform play player playful
    playground pleasant pleasantly please pleasure plentiful plenty plough plow pluck plum plump
    pocket poem poet poetic poetry point polish polished polite politics pond pony pool poor pop
    poppy popular population porcelain porch port portion porto portrait position positive possess
    possible post pot potato potion pottery pour powder power practical practice prairie praise
    pray prayer precious precise predict prefer premium prepare presence present press pretend
    pretty prevent previous price pride primary primitive prince princess principle print prison
    private prize probably problem process produce product profession professor profit program
    programme progress project promise promising proof proper propose protect proud proudly prove
    proverb provide public pudding pull pulse pump pumpkin punch pupil puppy pure purely purple
    purpose purr purse pursue push put puzzle qing quaint quality quantity quarrel quarter queen
    quest question queue quick quickly quiet quietly quill quilt quirky quito quiver quote rabbit
    race radiant radiate radio raft ragged rail railway rain rainbow raincoat raindrop rainfall
    rainy raise ramble range rapid rapidly rare rarely raspberry rat rattle raven raw ray reach
    read reader ready real realise reality realize really reason rebel recall receipt receive
    recent recipe recite recognise recognize record recover red reduce reed refer refine reflect
    reflection refresh refreshing refuge refuse regard region regret regular rejoice relate
    relation relationship relative relax release reliable relief religion reluctant remain
    remarkable remedy remember remind remote remove renew rent repair repay repeat reply report
    represent request require rescue research reserve reside resist resolve respect respond
    responsible rest restaurant restless restore result retreat return reunion reveal revive reward
    rhyme rhythm ribbon rice rich riddle ride rider ridge ridiculous riga right ring ripe ripple
    rise rising ritual rival river road roam roar roast robe robin rock rocky roll romance romantic
    roof rooftop room rooster root rope rosa rose rosy rotate rough round roundabout route routine
    row rowboat royal rub rubber ruby rude rug ruin rule rumble run runner rural rush rust rustic
    rustle rusty sack sacred sad saddle sadness safe safely saffron said sail sailor saint salad
    salt sample sanctuary sand sandwich sandy sapphire satin satisfy saturday sauce save savor
    savour say scale scarf scarlet scatter scene scent scholar school science scissors scone scoop
    score scramble scrap scratch scream screen script sculpture sea seagull search seaside season
    seat second secret secretly secure security see seed seek seem seldom select self sell send
    sensation sense sensitive sentence seoul separate september sequence serenade serene series
    serious seriously servant serve service session set setting settle seven several severe shade
    shadow shadowy shaft shaggy shake shallow shame shape share sharp shawl shed sheep sheet shelf
    shell shelter shepherd shield shift shimmer shine shining shiny ship shirt shiver shoe shop
    shore shoreline short shoulder shout show shower shrub shut shutter shy sick side sidewalk sigh
    sight sign signal signature significant silence silent silently silhouette silk silky silly
    silver similar simmer simple simply sincere sing singer single sink sip sister sit situation
    six size sketch skilful skill skillful skin skip skirt sky skyline slam slate sleep sleepy
    slender slice slide slight slip slope slow slowly slumber sly small smart smell smile smoke
    smooth smoothly snack snail snake snap snow snowfall snowflake snowman snowy snug soak soap
    soar social society sock sofa soft softly softness soil solar soldier solemn solid solitary
    solitude solve somebody someday sometimes somewhat somewhere son song soon soothe soothing
    sorrow sorry sort soul sound soup sour source south southern space spacious spade spare spark
    sparkle sparrow speak special specific speech speed spell spend spice spicy spider spill spin
    spiral spirit splash splendid splendor splendour split spoil spoke sponge spontaneous spoon
    sport spot spray spread spring sprinkle sprout square squirrel stability stable stack staff
    stage stained stair stall stamp stand standard star stare starlight starry start state
    statement station statue stay steadily steady steal steam steamy steel steep stem step stick
    stillness stir stitch stock stocking stomach stone stony stool stop storage store storm stormy
    story storyteller stove straight strange strangely stranger strap strategy straw strawberry
    stray stream street strength stretch strict strike string strip stripe stroll strong strongly
    structure struggle stubborn student studio study stuff stumble sturdy style subject subtle
    suburb succeed success sudden suddenly suffer sugar suggest suit suitable suitcase summer sun
    sunbeam sunday sunflower sunlight sunlit sunny sunrise sunset sunshine superb supper supply
    support suppose sure surely surface surprise surround surroundings survive suspect sven swallow
    swan swarm sway sweater sweep sweet sweetly sweetness swell swift swiftly swim swing swirl
    switch sword symbol sympathy system table tablecloth tail tailor take tale talent talented talk
    tall tame tangerine tangle tango tap tapestry tara target tart task taste tasty taught tea
    teach teacher team teapot tear tease technique technology teeth telephone television tell
    temper temperature temple temporary tempt ten tend tendency tender tenderly tent term terrace
    terrible test texture thank thankful theater theatre theme therefore thick thief thin thing
    think third thirst thirsty thirty thorn thoroughly thought thoughtful thousand thread three
    threshold thrill thrive throat throb throne throughout throw thumb thunder thunderstorm
    thursday thus ticket tickle tide tidy tie tiger tight tile timber time timeless timid tin tiny
    tip tired title toast today toddler toe tomato tomorrow tone tongue tonight tool tooth top
    topic torch toss total touch tough tourist towel tower town toy trace track trade trading
    tradition traffic trail train tranquil tranquility transform trap travel traveler traveller
    tray treasure treat tree treetop trellis tremble tremendous trend tribe tribute trick trickle
    trim trip triumph tropical trouble trousers truck true truly trumpet trunk trust truth try
    tuesday tug tulip tumble tune tunnel turin turn turtle twelve twenty twice twig twilight
    twinkle twirl twist two type typical ugly umar umbrella uncle uncover understand unexpected
    unfamiliar unfold unhappy unique unite universal universe university unknown unless unlike
    unusual upbeat uplift upper upright upset upstairs upward urban urge use useful usher usual
    usually utrecht utter vacation vacuum vague vain valiant valley valuable value van vanilla
    vanish vanishing variety various vase vast vegetable vehicle veil velvet venture vera veranda
    verse version vessel vibrant vibrate victory vienna view vigorous village villager vine vinegar
    vintage violet violin visible vision visit visitor visual vitality vivid vocal voice volume
    volunteer voyage wagon wait wake walk wall wallet walnut waltz wander wanderer want war ward
    wardrobe warm warmly warmth warn warrior warsaw wash waste watch water waterfall waterfront
    wave wax way weak wealth wear weary weather weathered weave weaver web wedding wednesday weed
    week weekend weekly weigh weight welcome well west wet whale wheat wheel whenever wherever
    whimsical whirl whirlwind whisker whisper whistle white whole wholesome wicked wide widely
    widow wife wild wilderness wildflower wildlife willing willow wim win wind windmill window
    windowsill windy wine wing winter wintry wipe wire wisdom wise wish wishful wistful wit witch
    witness wolf woman women wonder wonderful wonderland wood wooden woodland wool woolly word work
    workbench worker workshop world worm worry worth worthy wound wrap wreath wren wrinkle wrist
    write writer wrong ximena yard yarn yawn year yearn yell yellow yes yesterday yield yoga young
    youth youthful yusuf zagreb zebra zero zest zipper zoe zone
    """.split()
)
_ENDINGS = (
    ("ies", "y"), ("ied", "y"), ("ier", "y"), ("iest", "y"), ("ily", "y"), ("iness", "y"),
    ("es", ""), ("es", "e"), ("s", ""), ("ed", ""), ("ed", "e"), ("d", ""), ("ing", ""),
    ("ing", "e"),
    ("er", ""), ("er", "e"), ("est", ""), ("est", "e"), ("ly", ""), ("ly", "le"), ("ness", ""),
    ("less", ""), ("ful", ""), ("y", ""), ("y", "e"), ("en", ""), ("en", "e"), ("ment", ""),
    ("ish", ""),
    ("ves", "f"), ("ves", "fe"), ("able", ""), ("able", "e"), ("like", ""), ("ward", ""),
)  # fmt: skip
_IRREGULAR = frozenset(
    "ate became began bent blew bought bred brought built came caught crept dealt dug drank"
    " drew drove fell felt fed fled flew flown forgot fought found gave gone got gotten grew"
    " grown held hid hung heard knew laid led lent lit lain lay made meant met paid put ran rang"
    " read rode rose risen sang sat saw seen sent shone shook shot shown slept slid sold sought"
    " spent spoke spoken spun stole stood stuck struck sung swam swept swore swung taken taught"
    " threw thrown told took torn understood went woke woken won wore worn wove woven wrote"
    " written oh ah hey hi children men feet geese mice people lives leaves wolves knives".split()
)


def is_english(word: str) -> bool:
    """Whether a lower-case word, its plain form, or both halves of a compound are common."""
    word = word.replace("\u2019", "'")
    parts = [part for part in re.split("[-\u2010\u2011']", word) if part]
    if len(parts) > 1:
        return all(part in _SHORT or is_english(part) for part in parts)
    if word in FUNCTION or word in COMMON or word in _IRREGULAR:
        return True
    for ending, plain in _ENDINGS:
        if word.endswith(ending) and len(word) > len(ending) + 1:
            stem = word[: -len(ending)] + plain
            doubled = len(stem) > 3 and stem[-1] == stem[-2] and stem[:-1] in COMMON
            if stem in COMMON or stem in FUNCTION or (doubled and not plain):
                return True
    return False


# What an apostrophe leaves: it's, don't, we'll, I'd, you've, they're, I'm, o'clock.
_SHORT = frozenset("s t ll d ve re m o n don doesn didn isn aren wasn weren won couldn wouldn "
                   "shouldn hasn haven hadn ain".split())  # fmt: skip
